"""What a model is said to take is what its native backend takes, or a little more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.models.configs import CONFIGS

from penstock.layers.native_leaves import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.models.footprint import Step, on_native, on_torch
from penstock.models.native_model import NativeModel
from penstock.models.registry import builder
from penstock.models.spec import ModelSpec
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import ALIGNMENT, Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.quantization.schemes import NAMES, scheme

SMALL = ModelSpec.from_hf(
    CONFIGS["LlamaForCausalLM"]["mlp_bias"]
    | {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
)
SPECS = {
    "small": SMALL,
    "tied": replace(SMALL, tied_embeddings=True, attention_bias=False),
    "wide": replace(SMALL, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3),
    "wider": replace(SMALL, hidden_size=2048, intermediate_size=8192, num_heads=32, head_dim=64),
    "flat": replace(SMALL, hidden_size=2048, intermediate_size=512, num_heads=32, head_dim=64),
    "deep": replace(SMALL, num_layers=40),
}


@pytest.mark.parametrize("quantization", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_native(name: str, dtype: str, quantization: str) -> None:
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    spec, num_tokens, num_threads = SPECS[name], 2048, 2
    program = Program(Pool(library.load(), num_threads), num_tokens, 1)
    kv = KVMemory(spec.num_layers, 16, spec.num_kv_heads, spec.head_dim, dtype)
    arena = Arena()
    materials = NativeMaterials(program, arena, dtype, scheme(quantization, dtype), kv)
    model = NativeModel(builder(spec.architecture)(spec, NativeToolkit(materials)), materials)
    told = on_native(spec, dtype, quantization, Step(num_tokens, 128), num_threads)
    gaps = ALIGNMENT * 10 * (spec.num_layers + 1)  # behind vectors
    assert told.weight_bytes <= arena.num_bytes <= told.weight_bytes + gaps
    taken = model.program.num_bytes
    assert taken <= told.workspace_bytes <= taken * 7 // 4 + num_threads * 4 * 2**20


def test_torch_holds_a_tied_table_twice() -> None:
    step = Step(2048, 128)
    spec = replace(SMALL, tied_embeddings=True)
    told = on_torch(spec, "bfloat16", step)
    copied = spec.vocab_size * spec.hidden_size
    assert told.weight_bytes == 2 * (spec.num_parameters + copied)
    assert f"+ {copied:,} packed for the head" in told.weights
    assert on_torch(SMALL, "float32", step).weight_bytes == 4 * SMALL.num_parameters

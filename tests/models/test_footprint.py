"""What a model is said to take is what its native backend takes, or a little more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.models.configs import CONFIGS

from penstock.layers.native_leaves import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.models.footprint import Step, on_native, on_torch, thread_bytes
from penstock.models.native_model import NativeModel
from penstock.models.registry import builder
from penstock.models.spec import ModelSpec
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import ALIGNMENT, Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.quantization.schemes import NATIVE_NAMES, scheme

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
    "many heads": replace(SMALL, num_heads=64, num_kv_heads=64, head_dim=64),
    "one kv head": replace(
        SMALL, hidden_size=1024, intermediate_size=64, num_heads=32, num_kv_heads=1, head_dim=128
    ),
    "wide heads": replace(
        SMALL, hidden_size=512, intermediate_size=2048, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "tiny": replace(
        SMALL, hidden_size=16, intermediate_size=17, num_heads=1, num_kv_heads=1, head_dim=2
    ),
}


@pytest.mark.parametrize("quantization", NATIVE_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_native(name: str, dtype: str, quantization: str) -> None:
    check(SPECS[name], dtype, quantization, num_tokens=2048, num_threads=2)


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize("name", SPECS)
def test_native_in_small_steps_on_many_threads(name: str, num_tokens: int) -> None:
    check(SPECS[name], "float32", "int4", num_tokens=num_tokens, num_threads=9, num_slots=2**18)


def check(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    *,
    num_tokens: int,
    num_threads: int,
    num_slots: int = 16,
) -> None:
    """Compare with a program that is made for it."""
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    spec = replace(spec, num_layers=min(spec.num_layers, 2)) if num_slots > 16 else spec
    program = Program(Pool(library.load(), num_threads), num_tokens, 1)
    kv = KVMemory(spec.num_layers, num_slots, spec.num_kv_heads, spec.head_dim, "int8")
    arena = Arena()
    materials = NativeMaterials(program, arena, dtype, scheme(quantization, dtype), kv)
    model = NativeModel(builder(spec.architecture)(spec, NativeToolkit(materials)), materials)
    told = on_native(spec, dtype, quantization, Step(num_tokens, 128), num_threads)
    gaps = ALIGNMENT * 10 * (spec.num_layers + 1)  # behind vectors
    assert told.weight_bytes <= arena.num_bytes <= told.weight_bytes + gaps
    taken = model.program.num_bytes
    assert taken <= told.workspace_bytes <= taken * 7 // 4 + num_threads * thread_bytes(spec)


def test_torch_holds_a_tied_table_twice() -> None:
    step = Step(2048, 128)
    spec = replace(SMALL, tied_embeddings=True)
    told = on_torch(spec, "bfloat16", step)
    copied = spec.vocab_size * spec.hidden_size
    assert told.weight_bytes == 2 * (spec.num_parameters + copied)
    assert f"+ {copied:,} packed for the head" in told.weights
    assert on_torch(SMALL, "float32", step).weight_bytes == 4 * SMALL.num_parameters

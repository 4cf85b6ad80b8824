"""What a model is said to take is what its native backend takes, or a little more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.models.kinds import KINDS, Coded
from tests.models.llama_specs import SMALL, changed
from tests.models.plan_configs import LARGE

from penstock.layers.native_materials import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.models.compose import compose
from penstock.models.footprint import Step, on_native, on_torch, thread_bytes
from penstock.models.native_model import NativeModel
from penstock.models.spec import ModelSpec
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import ALIGNMENT, Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.quantization.codes import CodeForm
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import NATIVE_NAMES, scheme
from penstock.quantization.stored import StoredPrecision, precision_of

SPECS = {
    "small": SMALL,
    "tied": changed(SMALL, tied_embeddings=True, attention_bias=False),
    "wide": changed(SMALL, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3),
    "wider": changed(SMALL, hidden_size=2048, intermediate_size=8192, num_heads=32, head_dim=64),
    "flat": changed(SMALL, hidden_size=2048, intermediate_size=512, num_heads=32, head_dim=64),
    "deep": changed(SMALL, num_layers=40),
    "many heads": changed(SMALL, num_heads=64, num_kv_heads=64, head_dim=64),
    "one kv head": changed(
        SMALL, hidden_size=1024, intermediate_size=64, num_heads=32, num_kv_heads=1, head_dim=128
    ),
    "wide heads": changed(
        SMALL, hidden_size=512, intermediate_size=2048, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "tiny": changed(
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


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "int4-g128-a16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_native_of_every_kind(name: str, dtype: str, quantization: str) -> None:
    check(KINDS[name], dtype, quantization, num_tokens=2048, num_threads=2)


CODES = [
    (CodeForm("uint4", 32, "float16", has_minima=True), 16),
    (CodeForm("fp4", 32, "float32"), 16),
    (CodeForm("e4m3", 32), 16),
    (CodeForm("int8", 0), 16),
    (CodeForm("int8", 0), 8),
]


@pytest.mark.parametrize(("form", "activation_bits"), CODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "mixtral", "deepseek_v3"])
def test_native_of_codes(name: str, form: CodeForm, activation_bits: int) -> None:
    stored = Coded(form)._replace(activation_bits=activation_bits)
    check(KINDS[name], "bfloat16", "none", num_tokens=2048, num_threads=2, stored=stored)


@pytest.mark.parametrize("num_tokens", [64, 2048])
@pytest.mark.parametrize("quantization", ["none", "int8", "stored"])
@pytest.mark.parametrize("name", LARGE)
def test_native_of_published_shapes(name: str, quantization: str, num_tokens: int) -> None:
    config = LARGE[name]
    spec, stored = ModelSpec.from_hf(config), None
    if quantization == "stored":
        quantization, stored = "none", precision_of(config)
    elif quantization == "none" and name == "deepseek-v3":
        pytest.skip("its experts of one layer, in bfloat16, are 22 GB of addresses")
    spec = replace(spec, layers=spec.layers[-1:])
    check(spec, "bfloat16", quantization, num_tokens=num_tokens, num_threads=2, stored=stored)


def check(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    *,
    num_tokens: int,
    num_threads: int,
    num_slots: int = 16,
    stored: StoredPrecision | None = None,
) -> None:
    """Compare with a program that is made for it."""
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    spec = changed(spec, num_layers=min(spec.num_layers, 2)) if num_slots > 16 else spec
    program = Program(Pool(library.load(), num_threads), num_tokens, 1)
    kv = KVMemory(spec.num_layers, num_slots, *spec.cached, "int8")
    arena, formats = Arena(), Formats(scheme(quantization, dtype), stored)
    materials = NativeMaterials(program, arena, dtype, formats, kv)
    model = NativeModel(compose(spec, NativeToolkit(materials)), materials)
    told = on_native(spec, dtype, quantization, Step(num_tokens, 128), num_threads, stored)
    gaps = ALIGNMENT * len(arena.reserved)  # behind vectors
    assert told.weight_bytes <= arena.num_bytes <= told.weight_bytes + gaps
    taken = model.program.num_bytes
    assert taken <= told.workspace_bytes <= taken * 2 + num_threads * thread_bytes(spec)


def test_torch_holds_a_tied_table_twice() -> None:
    step = Step(2048, 128)
    spec = changed(SMALL, tied_embeddings=True)
    told = on_torch(spec, "bfloat16", step)
    copied = spec.vocab_size * spec.hidden_size
    assert told.weight_bytes == 2 * (spec.num_parameters + copied)
    assert f"+ {copied:,} packed for the head" in told.weights
    assert on_torch(SMALL, "float32", step).weight_bytes == 4 * SMALL.num_parameters

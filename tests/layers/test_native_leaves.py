"""Native leaves one by one: how a checkpoint's tensors get to their places, and what is recorded.

That whole models compute what torch does is in `tests/models/test_native_kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.layers.native_materials import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.layers.specs import ExpertsSpec, NormSpec, RopeSpec
from penstock.layers.toolkit import ExpertNames, Layer, Part, PositionTable, RowMap, StoredTensor
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Program
from penstock.native.structs import OpKind
from penstock.quantization.codes import CodedTensor, CodeForm, CodeRows
from penstock.quantization.placing import Formats, Piece
from penstock.quantization.schemes import Format, scheme

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no native library here"
)

F32 = NDArray[np.float32]
RMS = NormSpec(eps=1e-5)
NUM_TOKENS = 5


def random(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def stored(name: str, values: F32) -> StoredTensor:
    return StoredTensor(name, "F32", values.shape, values.reshape(-1).view(np.uint8))


@dataclass
class Bench:
    """A program around one leaf."""

    formats: Any = field(default_factory=lambda: Formats(scheme("none", "float32")))

    def __post_init__(self) -> None:
        self.program = Program(Pool(library.load(), 2), 8, 8)
        kv = KVMemory(1, 16, 2, 8, "float32")
        self.materials = NativeMaterials(self.program, Arena(), "float32", self.formats, kv)
        self.toolkit = NativeToolkit(self.materials)

    def load(self, layer: Layer, **given: F32) -> dict[str, F32]:
        """Load what is given by the last parts of names, else random numbers; all of them."""
        loaded = {}
        for index, weight in enumerate(layer.weights()):
            values = given.get(weight.name, random(*weight.shape, seed=index))
            weight.load(stored(weight.name, values))
            loaded[weight.name] = values
        layer.finish()
        return loaded

    def run(self, record: Callable[..., Buffer], *inputs: F32, positions: Any = None) -> F32:
        """What the leaf gives for the inputs [T, any]."""
        values = [self.program.value(x.shape[1], "float32") for x in inputs]
        out = record(*values)
        part = self.program.end_part()
        self.program.finish()
        for value, x in zip(values, inputs, strict=True):
            self.program.view(value)[:NUM_TOKENS] = x
        step = SimpleNamespace(
            input_ids=np.arange(NUM_TOKENS),
            positions=np.arange(NUM_TOKENS) if positions is None else positions,
            query_start=np.array([0, NUM_TOKENS], np.int32),
            context_len=np.array([NUM_TOKENS], np.int32),
            slot_mapping=np.arange(NUM_TOKENS),
            block_table=np.zeros((1, 1), np.int32),
            block_size=16,
        )
        self.program.set_step(step)
        self.program.run(part)
        found: F32 = self.program.view(out)[:NUM_TOKENS].copy()
        return found

    @property
    def kinds(self) -> list[OpKind]:
        """Of the ops that were recorded."""
        return [recorded.kind for recorded in self.program._recorded]


class Cut(NamedTuple):
    """Formats that cut a joined matrix behind its first part."""

    forms: tuple[Format, Format] = (Format("float32"), Format("int8"))
    activation_bits: int = 16
    stored: None = None

    def linear(self, parts: Sequence[tuple[str, int]], *_: Any, is_gated: bool) -> list[Piece]:
        sizes = [num_rows for _, num_rows in parts]
        return [
            Piece(0, 1, sizes[0], self.forms[0]),
            Piece(1, len(sizes) - 1, sum(sizes[1:]), self.forms[1]),
        ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("formats", [Formats(scheme("none", "float32")), Cut()])
def test_a_linear_joins_its_parts(formats: Any, bias: bool) -> None:
    """One op for each format; all of them write to columns of one value."""
    bench = Bench(formats)
    parts = [Part("q", 10), Part("k", 3), Part("v", 21)]
    linear = bench.toolkit.linear(40, parts, bias=bias)
    loaded = bench.load(linear)
    assert list(loaded) == [f"{n}.{k}" for n in "qkv" for k in ["weight", "bias"][: 1 + bias]]
    x = random(NUM_TOKENS, 40, seed=9)
    found = bench.run(linear, x)
    assert len(bench.kinds) == (2 if isinstance(formats, Cut) else 1)
    expected = np.concatenate(
        [x @ loaded[f"{n}.weight"].T + loaded.get(f"{n}.bias", np.float32(0)) for n in "qkv"], 1
    )
    np.testing.assert_allclose(found[:, :10], expected[:, :10], atol=1e-4)
    np.testing.assert_allclose(found, expected, atol=0.3 if isinstance(formats, Cut) else 1e-4)


def test_rows_of_a_part_are_the_loaders_business() -> None:
    bench = Bench()
    rows = RowMap(20, np.arange(4, 10), True)
    linear = bench.toolkit.linear(8, [Part("qkv", 6, rows=rows)], bias=True)
    weight, bias = linear.weights()
    assert (weight.shape, weight.rows, weight.stored_shape) == ((6, 8), rows, (8, 20))
    assert (bias.shape, bias.rows, bias.stored_shape) == ((6,), rows, (20,))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_vectors_of_every_dtype_and_alignment(dtype: str) -> None:
    bench = Bench()
    norm = bench.toolkit.norm("norm", 6, NormSpec(eps=1e-5, offset=1.0))
    values = np.array([0.5, -2.0, 1.25, 0.0, 3.0, -0.125], np.float32)  # exact in all of them
    raw = values.astype(np.float16) if dtype == "F16" else values
    data = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else raw
    shifted = np.concatenate([np.zeros(1, np.uint8), data.view(np.uint8)])[1:]
    (weight,) = norm.weights()
    weight.load(StoredTensor("norm.weight", dtype, (6,), shifted))
    norm.finish()
    x = random(NUM_TOKENS, 6)
    expected = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * (1 + values)
    np.testing.assert_allclose(bench.run(norm, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("has_scale", [False, True])
def test_a_scale_that_is_not_loaded_is_one(offset: float, has_scale: bool) -> None:
    bench = Bench()
    spec = NormSpec(eps=0.0, offset=offset, has_scale=has_scale, has_bias=True)
    norm = bench.toolkit.norm("norm", 6, spec)
    assert [w.name for w in norm.weights()] == ["norm.weight", "norm.bias"][not has_scale :]
    norm.finish()
    x = random(NUM_TOKENS, 6)
    expected = x / np.sqrt((x * x).mean(1, keepdims=True))
    np.testing.assert_allclose(bench.run(norm, x), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_norm_adds_to_the_stream(scale: float) -> None:
    residual, x = random(NUM_TOKENS, 6), random(NUM_TOKENS, 6, seed=1)
    bench = Bench()
    norm = bench.toolkit.norm("norm", 6, NormSpec(eps=0.0))
    norm.finish()
    total = residual + np.float32(scale) * x
    length = np.sqrt((total * total).mean(1, keepdims=True))
    kept: list[Buffer] = []

    def record(stream: Buffer, value: Buffer) -> Buffer:
        kept.append(stream)
        return norm.add(stream, value, scale)

    found = bench.run(record, residual, x)
    np.testing.assert_allclose(found, total / length, rtol=1e-5)
    np.testing.assert_allclose(bench.program.view(kept[0])[:NUM_TOKENS], total, rtol=1e-6)


def test_the_stream_is_float32_and_norms_are_in_the_models_format() -> None:
    bench = Bench()
    bench.materials = NativeMaterials(
        bench.program, Arena(), "bfloat16", bench.formats, bench.materials.kv
    )
    norm = NativeToolkit(bench.materials).norm("norm", 6, NormSpec(eps=0.0))
    norm.finish()
    assert norm(bench.program.value(6, "float32")).dtype == "bfloat16"
    assert norm.renew(bench.program.value(6, "float32"), None).dtype == "float32"


@pytest.mark.parametrize("has_types", [False, True])
def test_positions_and_types_are_added_to_the_table(has_types: bool) -> None:
    bench = Bench()
    types: dict[str, Any] = {"types": "types", "num_types": 2} if has_types else {}
    table = PositionTable("wpe", 4, first_row=1, **types)
    embedding = bench.toolkit.embedding("wte", 9, 6, scale=2.0, positions=table)
    loaded = bench.load(embedding)
    # A token of type 1 is 4 positions further on; what comes after the last row takes that one.
    found = bench.run(partial(embedding, None), positions=np.array([0, 2, 4, 6, 20]))
    if has_types:
        rows, kinds = [1, 3, 1, 3, 3], [0, 0, 1, 1, 1]
        added = loaded["wpe.weight"][rows] + loaded["types.weight"][kinds]
    else:
        added = loaded["wpe.weight"][[1, 3, 3, 3, 3]]
    expected = 2 * loaded["wte.weight"][:NUM_TOKENS] + added
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_angles_are_recorded_once_for_equal_rotations() -> None:
    bench = Bench()
    spec = RopeSpec(dim=4, theta=100.0)
    one, other, last = (
        bench.toolkit.rotary(spec, first=first, num_heads=1, head_dim=8)
        for spec, first in ((spec, 0), (spec, 8), (RopeSpec(dim=4, theta=200.0), 0))
    )
    x = random(NUM_TOKENS, 16)
    found = bench.run(lambda value: last(other(one(value, None), None), None), x)
    assert bench.kinds.count(OpKind.ANGLES) == 2
    assert bench.kinds.count(OpKind.ROPE) == 3
    assert np.array_equal(found[:, 4:8], x[:, 4:8])
    assert np.array_equal(found[:, 12:], x[:, 12:])
    assert not np.isclose(found[1:, 8:12], x[1:, 8:12]).all()


def test_experts_of_different_formats_are_not_quantized() -> None:
    forms = {"gate.1.weight": Format("int8")}

    class Mixed(Formats):
        def linear(self, parts: Any, num_columns: int, *, is_gated: bool) -> list[Piece]:
            form = forms.get(parts[0][0], Format("float32"))
            return [Piece(0, len(parts), sum(rows for _, rows in parts), form)]

    bench = Bench(Mixed(scheme("none", "float32")))
    names = ExpertNames("router", "gate.{}", "up.{}", "down.{}", "correction")
    spec = ExpertsSpec(num_experts=2, top_k=1, size=5, activation="silu")
    experts: Any = bench.toolkit.experts(8, spec, names)
    assert experts._gate_up.form == Format("float32")
    forms["gate.0.weight"] = Format("int8")
    experts = bench.toolkit.experts(8, spec, names)
    assert experts._gate_up.form == Format("int8")
    assert experts._down.form == Format("float32")


def coded(name: str, num_rows: int, num_columns: int, form: CodeForm) -> CodedTensor:
    rng = np.random.default_rng(5)
    low, high = (0, 16) if form.bits == 4 else (0, 256)
    codes = rng.integers(low, high, (num_rows, num_columns)).astype(np.uint8)
    codes[codes == 128] = 0  # as int8 a number that INT8 has not
    groups = -(-num_columns // form.group_size) if form.group_size else 1
    scales = rng.uniform(0.01, 0.02, (num_rows, groups)).astype(np.float32)

    def rows(first: int, last: int) -> CodeRows:
        return CodeRows(codes[first:last], scales[first:last])

    return CodedTensor(name, form, (num_rows, num_columns), codes.nbytes, rows)


@pytest.mark.parametrize("num_rows", [10, 2100])
@pytest.mark.parametrize("gated", [False, True])
def test_codes_are_numbers_where_a_matrix_is_plain(num_rows: int, gated: bool) -> None:
    bench = Bench()
    parts = [Part("gate", num_rows), Part("up", num_rows)]
    activation: Any = "relu" if gated else None
    linear = bench.toolkit.linear(64, parts, bias=False, gated=gated, activation=activation)
    tensors = [coded(p.name, num_rows, 64, CodeForm("int4", 32)) for p in parts]
    for weight, tensor in zip(linear.weights(), tensors, strict=True):
        weight.load(tensor)
    x = random(NUM_TOKENS, 64)
    gate, up = (x @ tensor.values().T for tensor in tensors)
    expected = np.maximum(gate, 0) * up if gated else np.concatenate([gate, up], 1)
    np.testing.assert_allclose(bench.run(linear, x), expected, atol=1e-4)


class Coded(NamedTuple):
    """A `StoredPrecision` in which every matrix has one form."""

    code: CodeForm
    activation_bits: int = 16
    name: str = "coded"

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        return None if name.startswith("v.") else self.code

    def join(self, tensors: Any) -> Any:
        return tensors


@pytest.mark.parametrize(
    ("form", "bits"),
    [(CodeForm("int8", 0), 8), (CodeForm("int8", 0), 16), (CodeForm("nf4", 32), 16)],
)
def test_codes_are_taken_as_they_are(form: CodeForm, bits: int) -> None:
    bench = Bench(Formats(scheme("none", "float32"), Coded(form, bits)))
    parts = [Part("q", 10), Part("k", 20), Part("v", 7)]
    linear = bench.toolkit.linear(64, parts, bias=False)
    tensors = [coded(part.name, part.num_rows, 64, form) for part in parts[:2]]
    plain = random(7, 64)
    *both, last = linear.weights()
    for weight, tensor in zip(both, tensors, strict=True):
        weight.load(tensor)
    last.load(stored("v", plain))
    x = random(NUM_TOKENS, 64)
    expected = np.concatenate([x @ m.T for m in (*(t.values() for t in tensors), plain)], 1)
    found = bench.run(linear, x)
    assert len(bench.kinds) == 2
    atol = 0.02 * np.abs(expected).max() if bits == 8 else 1e-4
    np.testing.assert_allclose(found, expected, atol=atol)
    assert not np.array_equal(found, expected) or bits == 16


@pytest.mark.parametrize(
    ("promised", "found"),
    [
        (Coded(CodeForm("int4", 32)), stored("q.weight", random(10, 64))),
        (Coded(CodeForm("int8", 0), 8), stored("q.weight", random(10, 64))),
        (Coded(CodeForm("int4", 32)), coded("q.weight", 10, 64, CodeForm("nf4", 32))),
        (Coded(CodeForm("int8", 0), 8), coded("q.weight", 10, 64, CodeForm("nf4", 32))),
    ],
)
def test_what_the_config_does_not_say_is_refused(promised: Coded, found: Any) -> None:
    bench = Bench(Formats(scheme("none", "float32"), promised))
    (weight,) = bench.toolkit.linear(64, [Part("q", 10)], bias=False).weights()
    with pytest.raises(ModelLoadError, match=r"`q\.weight` is stored as .*not what the"):
        weight.load(found)

"""Every op through ctypes against numpy, on every instruction set of this machine.

The kernels have tests of their own in csrc/tests; here it counts that what Python hands over is
what they read: structs, strides, packed rows, row selections.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import ops_oracle as oracle
import pytest
from numpy.typing import NDArray

from penstock.errors import EngineError
from penstock.native.kv_memory import KVMemory
from penstock.native.library import Library
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Program
from penstock.native.structs import (
    AnglesArgs,
    AttentionArgs,
    EmbedArgs,
    Epilogue,
    Isa,
    LinearArgs,
    NormArgs,
    OpKind,
    RopeArgs,
    Rows,
)
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization.schemes import Format
from penstock.quantization.unpack import unpack

F32 = NDArray[np.float32]
FORMATS = [
    Format("float32"),
    Format("bfloat16"),
    Format("int8"),
    Format("int4", 32),
    Format("int4", 128),
]
MAX_TOKENS = 48


class Step(NamedTuple):
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    block_table: NDArray[np.int32]
    block_size: int


def step_of(num_tokens: int, ids: NDArray[np.int64] | None = None) -> Step:
    """One request of that many tokens."""
    return Step(
        np.zeros(num_tokens, np.int64) if ids is None else ids,
        np.arange(num_tokens),
        np.array([0, num_tokens], np.int32),
        np.array([num_tokens], np.int32),
        np.arange(num_tokens),
        np.zeros((1, 1), np.int32),
        MAX_TOKENS,
    )


def put(program: Program, value: Buffer, x: NDArray[Any]) -> None:
    """Write x [rows, width] into a value."""
    view = program.view(value)[: len(x)]
    view[:] = oracle.to_bits(x) if value.dtype == "bfloat16" else x


def get(program: Program, value: Buffer, num_rows: int) -> F32:
    view = program.view(value)[:num_rows]
    return oracle.from_bits(view) if value.dtype == "bfloat16" else view.copy()


def packed(pool: Pool, form: Format, source: F32) -> PackedWeight:
    weight = PackedWeight(pool, form.dtype, form.group_size, *source.shape, Arena())
    weight.pack(source.view(np.uint8).reshape(-1), "float32", len(source), Placement())
    return weight


def unpacked(form: Format, weight: PackedWeight) -> F32:
    return unpack(form, weight.data, weight.scales, weight.num_rows, weight.num_columns)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (64, 384)])
def test_packing_keeps_the_numbers(pool: Pool, form: Format, shape: tuple[int, int]) -> None:
    source = np.random.default_rng(1).standard_normal(shape, np.float32)
    error = np.abs(unpacked(form, packed(pool, form, source)) - source)
    peak = np.abs(source).max(1, keepdims=True)
    # int4: half a step of a group whose peak may be the row's.
    bound = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.51 / 127, "int4": 0.3}[form.dtype]
    assert (error <= bound * peak).all()
    if form.dtype == "int4" and shape[1] > 1:
        assert np.sqrt((error**2).mean() / (source**2).mean()) < 0.13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sources_of_every_dtype_and_alignment(pool: Pool, dtype: str) -> None:
    numbers = np.random.default_rng(2).standard_normal((18, 70), np.float32)
    raw = {"float32": numbers, "bfloat16": oracle.to_bits(numbers)}.get(dtype)
    data = np.ascontiguousarray(numbers.astype(np.float16) if raw is None else raw)
    shifted = np.zeros(data.nbytes + 1, np.uint8)
    shifted[1:] = data.view(np.uint8).reshape(-1)
    weight = PackedWeight(pool, "float32", 0, 18, 70, Arena())
    weight.pack(shifted[1:], dtype, 18, Placement())
    expected = {"float32": numbers, "bfloat16": oracle.rounded(numbers)}.get(dtype)
    expected = numbers.astype(np.float16).astype(np.float32) if expected is None else expected
    assert np.array_equal(unpacked(Format("float32"), weight), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_parts_lie_where_they_are_placed(pool: Pool, form: Format) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((n, 96), np.float32) for n in (20, 3, 30)]
    joined = PackedWeight(pool, form.dtype, form.group_size, 53, 96, Arena())
    first = 0
    for part in parts:
        joined.pack(part.view(np.uint8).reshape(-1), "float32", len(part), Placement(first))
        first += len(part)
    whole = unpacked(form, packed(pool, form, np.concatenate(parts)))
    assert np.array_equal(unpacked(form, joined), whole)

    gate, up = rng.standard_normal((2, 20, 96), np.float32)
    pair = PackedWeight(pool, form.dtype, form.group_size, 64, 96, Arena())
    places = Placement(0, 2), Placement(16, 2)
    for part, place in zip((gate, up), places, strict=True):
        pair.pack(part.view(np.uint8).reshape(-1), "float32", 20, place)
    rows = unpacked(form, pair)
    for part, place in zip((gate, up), places, strict=True):
        expected = unpacked(form, packed(pool, form, np.ascontiguousarray(part)))
        assert np.array_equal(rows[place.rows(20)], expected)


def test_what_does_not_fit_is_refused(pool: Pool) -> None:
    weight = PackedWeight(pool, "float32", 0, 16, 8, Arena())
    with pytest.raises(EngineError, match="do not fit"):
        weight.pack(np.zeros(17 * 8 * 4, np.uint8), "float32", 17, Placement())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_embed(pool: Pool, isa: Isa, form: Format) -> None:
    table = packed(pool, form, np.random.default_rng(4).standard_normal((50, 72), np.float32))
    program = Program(pool, MAX_TOKENS, 1)
    out = program.value(72, "float32")
    program.append(OpKind.EMBED, EmbedArgs(table=table.struct, out_stride=72), out=out)
    part = program.end_part()
    program.finish()
    ids = np.array([3, 49, 0, 3], np.int64)
    program.set_step(step_of(4, ids))
    program.run(part)
    np.testing.assert_allclose(get(program, out, 4), unpacked(form, table)[ids], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize("size", [1, 72, 576])
def test_norm(pool: Pool, isa: Isa, dtype: str, has_x: bool, size: int) -> None:
    rng = np.random.default_rng(size)
    start, added = rng.standard_normal((2, 5, size)).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    program = Program(pool, MAX_TOKENS, 1)
    residual, out = program.value(size, "float32"), program.value(size, dtype)
    x = program.value(size, dtype)
    args = NormArgs(
        residual_stride=size,
        x_stride=size,
        weight=weight.ctypes.data,
        out_stride=size,
        size=size,
        eps=1e-3,
        dtype=out.dtype_id,
    )
    values = {"residual": residual, "out": out} | ({"x": x} if has_x else {})
    program.append(OpKind.NORM, args, **values)
    part = program.end_part()
    program.finish()
    put(program, residual, start)
    if has_x:
        put(program, x, added)
        start = start + get(program, x, 5)
    program.set_step(step_of(5))
    program.run(part)
    np.testing.assert_allclose(get(program, residual, 5), start, rtol=1e-6)
    expected = oracle.norm(start.astype(np.float64), weight, 1e-3)
    rtol = 3e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(get(program, out, 5), expected, rtol=rtol, atol=1e-7)


class Product(NamedTuple):
    """A linear op with its operands."""

    program: Program
    x: Buffer
    y: Buffer
    part: Any
    matrix: F32  # as it is packed


def product(
    pool: Pool,
    form: Format,
    *,
    dtype: str,
    bits: int = 8,
    rows: Rows = Rows.TOKENS,
    bias: F32 | None = None,
) -> Product:
    source = np.random.default_rng(5).standard_normal((37, 200), np.float32)
    weight = packed(pool, form, source)
    program = Program(pool, MAX_TOKENS, MAX_TOKENS)
    x, y = program.value(200, dtype), program.value(37, "float32", rows)
    args = LinearArgs(
        weight=weight.struct,
        bias=None if bias is None else bias.ctypes.data,
        x_stride=200,
        y_stride=37,
        x_dtype=x.dtype_id,
        y_dtype=y.dtype_id,
        rows=rows,
        epilogue=Epilogue.STORE,
        activation_bits=bits,
        num_outputs=37,
    )
    program.append(OpKind.LINEAR, args, x=x, y=y)
    part = program.end_part()
    program.finish()
    held = program, x, y, part, unpacked(form, weight)
    program.weight = weight  # type: ignore[attr-defined]  # its memory
    return Product(*held)


@pytest.mark.parametrize("num_tokens", [1, 3, 17, MAX_TOKENS])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_linear(pool: Pool, isa: Isa, form: Format, dtype: str, bits: int, num_tokens: int) -> None:
    bias = np.random.default_rng(6).standard_normal(48).astype(np.float32)
    run = product(pool, form, dtype=dtype, bits=bits, bias=bias)
    x = np.random.default_rng(7).standard_normal((num_tokens, 200)).astype(np.float32)
    put(run.program, run.x, x)
    x = get(run.program, run.x, num_tokens)
    run.program.set_step(step_of(num_tokens))
    run.program.run(run.part)
    is_integer = form.dtype.startswith("int")
    if is_integer and bits == 8:
        seen = oracle.quantized_rows(x)
    elif form.dtype == "float32":
        seen = x.astype(np.float64)
    else:
        seen = oracle.rounded(x)
    expected = seen @ run.matrix.T.astype(np.float64) + bias[:37]
    room = np.abs(seen) @ np.abs(run.matrix.T) + 1  # what rounding errors are relative to
    error = np.abs(get(run.program, run.y, num_tokens) - expected) / room
    assert error.max() < 2e-6, error.max()


def test_logit_rows_choose_tokens(pool: Pool, isa: Isa) -> None:
    run = product(pool, FORMATS[0], dtype="float32", rows=Rows.LOGITS)
    x = np.random.default_rng(8).standard_normal((20, 200)).astype(np.float32)
    put(run.program, run.x, x)
    run.program.set_step(step_of(20))
    for rows in ([0], [19], [2, 5, 6, 18], list(range(20))):
        run.program.set_logit_rows(np.array(rows))
        run.program.run(run.part)
        expected = x[rows] @ run.matrix.T
        np.testing.assert_allclose(get(run.program, run.y, len(rows)), expected, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("size", [20, 32, 100])
def test_gate_and_up(pool: Pool, isa: Isa, form: Format, size: int) -> None:
    rng = np.random.default_rng(9)
    gate, up = rng.standard_normal((2, size, 64), np.float32)
    num_rows = 2 * -(-size // 16) * 16
    weight = PackedWeight(pool, form.dtype, form.group_size, num_rows, 64, Arena())
    places = Placement(0, 2), Placement(16, 2)
    for part, place in zip((gate, up), places, strict=True):
        weight.pack(part.view(np.uint8).reshape(-1), "float32", size, place)
    program = Program(pool, MAX_TOKENS, 1)
    x, y = program.value(64, "bfloat16"), program.value(size, "bfloat16")
    args = LinearArgs(
        weight=weight.struct,
        x_stride=64,
        y_stride=size,
        x_dtype=x.dtype_id,
        y_dtype=y.dtype_id,
        epilogue=Epilogue.SILU_MUL,
        activation_bits=16,
        num_outputs=size,
    )
    program.append(OpKind.LINEAR, args, x=x, y=y)
    run = program.end_part()
    program.finish()
    put(program, x, rng.standard_normal((7, 64)))
    program.set_step(step_of(7))
    program.run(run)
    seen = oracle.rounded(get(program, x, 7))
    rows = unpacked(form, weight)
    first, second = (seen @ rows[place.rows(size)].T for place in places)
    expected = oracle.silu(first) * second
    np.testing.assert_allclose(get(program, y, 7), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope(pool: Pool, isa: Isa, dtype: str) -> None:
    """Three heads of four are rotated, in place."""
    rng = np.random.default_rng(10)
    half = 10
    frequencies = (100.0 ** -(np.arange(half) / half)).astype(np.float32)
    program = Program(pool, MAX_TOKENS, 1)
    angles, x = program.value(2 * half, "float32"), program.value(4 * 2 * half, dtype)
    angle_args = AnglesArgs(frequencies=frequencies.ctypes.data, half=half)
    program.append(OpKind.ANGLES, angle_args, out=angles)
    args = RopeArgs(stride=4 * 2 * half, half=half, num_heads=3, dtype=x.dtype_id)
    program.append(OpKind.ROPE, args, angles=angles, x=x)
    part = program.end_part()
    program.finish()
    positions = np.array([0, 1, 77, 3000, 5])
    put(program, x, rng.standard_normal((5, 4 * 2 * half)))
    before = get(program, x, 5).reshape(5, 4, 2 * half).astype(np.float64)
    program.set_step(step_of(5)._replace(positions=positions))
    program.run(part)
    after = get(program, x, 5).reshape(5, 4, 2 * half)
    expected = oracle.rotated(before[:, :3], positions, frequencies)
    atol = 1e-5 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(after[:, :3], expected, atol=atol, rtol=atol)
    assert np.array_equal(after[:, 3], before[:, 3])


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "atol"),
    [
        ("float32", "float32", 1e-5),
        ("bfloat16", "bfloat16", 0.03),
        ("bfloat16", "int8", 0.06),
        ("float32", "int8", 0.06),
        ("float32", "bfloat16", 0.03),
        ("bfloat16", "float32", 0.03),
    ],
)
def test_attention(
    pool: Pool, isa: Isa, dtype: str, kv_dtype: str, atol: float, block_size: int
) -> None:
    """Rows that decode and rows with a chunk, over blocks in a scattered order."""
    rng = np.random.default_rng(11)
    heads, kv_heads, size, num_blocks = 4, 2, 24, 160
    width = (heads + 2 * kv_heads) * size
    kv = KVMemory(1, num_blocks * block_size, kv_heads, size, kv_dtype)
    program = Program(pool, MAX_TOKENS, 1)
    qkv, out = program.value(width, dtype), program.value(heads * size, dtype)
    args = AttentionArgs(
        qkv_stride=width,
        out_stride=heads * size,
        kv=kv.layer(0),
        kv_scales=kv.layer_scales(0),
        num_slots=kv.num_slots,
        dtype=qkv.dtype_id,
        kv_dtype=kv.dtype_id,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        scale=0.3,
    )
    program.append(OpKind.ATTENTION, args, qkv=qkv, out=out)
    part = program.end_part()
    program.finish()

    vectors = rng.standard_normal((2, 40, heads + 2 * kv_heads, size))
    table = rng.permutation(num_blocks).astype(np.int32).reshape(2, num_blocks // 2)
    cuts = [(0, 0), (7, 1), (8, 20), (9, 30), (37, 31), (38, 40), (40, 40)]
    for (a, b), (next_a, next_b) in pairwise(cuts):
        spans = [(row, *span) for row, span in enumerate([(a, next_a), (b, next_b)])]
        spans = [span for span in spans if span[1] < span[2]]
        fresh = np.concatenate([vectors[row, first:last] for row, first, last in spans])
        put(program, qkv, fresh.reshape(len(fresh), -1))
        positions = np.concatenate([np.arange(first, last) for _, first, last in spans])
        rows = np.repeat([row for row, _, _ in spans], [last - first for _, first, last in spans])
        slots = table[rows, positions // block_size].astype(np.int64) * block_size
        step = Step(
            np.zeros(len(fresh), np.int64),
            positions,
            np.cumsum([0, *(last - first for _, first, last in spans)]).astype(np.int32),
            np.array([last for _, _, last in spans], np.int32),
            slots + positions % block_size,
            table[[row for row, _, _ in spans]],
            block_size,
        )
        program.set_step(step)
        program.run(part)
        found = get(program, out, len(fresh)).reshape(len(fresh), heads, size)
        for (row, first, last), at in zip(spans, step.query_start.tolist(), strict=False):
            seen = vectors[row, :last]
            expected = oracle.attention(
                seen[first:, :heads], seen[:, heads:-kv_heads], seen[:, -kv_heads:], 0.3
            )
            np.testing.assert_allclose(found[at : at + last - first], expected, atol=atol)


def test_an_op_that_cannot_run_is_told(pool: Pool, library: Library) -> None:
    program = Program(pool, 4, 4)
    out = program.value(8, "float32")
    program.append(OpKind.NORM, NormArgs(size=-1), out=out)
    program.end_part()
    with pytest.raises(EngineError, match="op 0"):
        program.finish()
    with pytest.raises(EngineError, match="not available"):
        library.call("penstock_set_isa", 77)

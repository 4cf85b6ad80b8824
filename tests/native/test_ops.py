"""Every op through ctypes against numpy, on every instruction set of this machine.

The kernels have tests of their own in csrc/tests; here it counts that what Python hands over is
what they read: structs, strides, packed rows, row selections.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import ops_oracle as oracle
import pytest
from ops_program import (
    F32,
    FORMATS,
    MAX_TOKENS,
    get,
    packed,
    put,
    step_of,
    unpacked,
)

from penstock.errors import EngineError
from penstock.native.library import Library
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Program
from penstock.native.structs import (
    Activation,
    Epilogue,
    Isa,
    LinearArgs,
    NormArgs,
    OpKind,
    Rows,
)
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization.schemes import Format


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
    weight = PackedWeight(pool, Format("float32"), 18, 70, Arena())
    weight.pack(shifted[1:], dtype, 18, Placement())
    expected = {"float32": numbers, "bfloat16": oracle.rounded(numbers)}.get(dtype)
    expected = numbers.astype(np.float16).astype(np.float32) if expected is None else expected
    assert np.array_equal(unpacked(Format("float32"), weight), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_parts_lie_where_they_are_placed(pool: Pool, form: Format) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((n, 96), np.float32) for n in (20, 3, 30)]
    joined = PackedWeight(pool, form, 53, 96, Arena())
    first = 0
    for part in parts:
        joined.pack(part.view(np.uint8).reshape(-1), "float32", len(part), Placement(first))
        first += len(part)
    whole = unpacked(form, packed(pool, form, np.concatenate(parts)))
    assert np.array_equal(unpacked(form, joined), whole)

    gate, up = rng.standard_normal((2, 20, 96), np.float32)
    pair = PackedWeight(pool, form, 64, 96, Arena())
    places = Placement(0, 2), Placement(16, 2)
    for part, place in zip((gate, up), places, strict=True):
        pair.pack(part.view(np.uint8).reshape(-1), "float32", 20, place)
    rows = unpacked(form, pair)
    for part, place in zip((gate, up), places, strict=True):
        expected = unpacked(form, packed(pool, form, np.ascontiguousarray(part)))
        assert np.array_equal(rows[place.rows(20)], expected)


def test_what_does_not_fit_is_refused(pool: Pool) -> None:
    weight = PackedWeight(pool, Format("float32"), 16, 8, Arena())
    with pytest.raises(EngineError, match="do not fit"):
        weight.pack(np.zeros(17 * 8 * 4, np.uint8), "float32", 17, Placement())


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
        num_groups=1,
        epilogue=Epilogue.STORE,
        activation_bits=bits,
        num_outputs=37,
        y_scale=1.0,
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
    weight = PackedWeight(pool, form, num_rows, 64, Arena())
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
        num_groups=1,
        epilogue=Epilogue.GATED,
        activation=Activation.SILU,
        activation_bits=16,
        num_outputs=size,
        y_scale=1.0,
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


def test_an_op_that_cannot_run_is_told(pool: Pool, library: Library) -> None:
    program = Program(pool, 4, 4)
    out = program.value(8, "float32")
    program.append(OpKind.NORM, NormArgs(size=-1), out=out)
    program.end_part()
    with pytest.raises(EngineError, match="op 0"):
        program.finish()
    with pytest.raises(EngineError, match="not available"):
        library.call("penstock_set_isa", 77)

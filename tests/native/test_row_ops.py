"""Embedding, norms, rotations, sums and copies through ctypes against numpy, on every instruction
set: what Python hands over is what the ops read. The kernels' own tests are in csrc/tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ops_oracle as oracle
import pytest
from ops_program import F32, FORMATS, MAX_TOKENS, get, packed, put, step_of, unpacked

from penstock.errors import EngineError
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Program
from penstock.native.structs import (
    AddArgs,
    AnglesArgs,
    CopyArgs,
    EmbedArgs,
    Isa,
    NormArgs,
    NormKind,
    OpKind,
    RopeArgs,
    SliceNormArgs,
)
from penstock.quantization.schemes import Format

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("kind", list(NormKind))


def normed(x: F32, kind: NormKind, weight: F32, bias: Any, eps: float) -> Any:
    """The definition, in float64, over the last dimension."""
    values = x.astype(np.float64)
    if kind == NormKind.LAYER_NORM:
        values = values - values.mean(-1, keepdims=True)
    scale = np.sqrt((values**2).mean(-1, keepdims=True) + eps)
    return values / scale * weight + (0 if bias is None else bias)


def finished(program: Program, num_tokens: int, **step: Any) -> Any:
    """The program's only part, ready to run for so many tokens."""
    part = program.end_part()
    program.finish()
    program.set_step(step_of(num_tokens)._replace(**step))
    return part


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.5])
@pytest.mark.parametrize("has_positions", [False, True])
def test_embed(pool: Pool, isa: Isa, form: Format, scale: float, has_positions: bool) -> None:
    rng = np.random.default_rng(4)
    table = packed(pool, form, rng.standard_normal((50, 72), np.float32))
    added = rng.standard_normal((3, 72), np.float32)
    program = Program(pool, MAX_TOKENS, 1)
    out = program.value(72, "float32")
    args = EmbedArgs(table=table.struct, out_stride=72, scale=scale)
    if has_positions:
        args.positions, args.num_positions = added.ctypes.data, len(added)
    program.append(OpKind.EMBED, args, out=out)
    ids = np.array([3, 49, 0, 3], np.int64)
    program.run(finished(program, 4, input_ids=ids))
    expected = unpacked(form, table)[ids] * np.float32(scale)
    if has_positions:
        expected = expected + added[[0, 1, 2, 2]]  # a later position takes the last
    np.testing.assert_allclose(get(program, out, 4), expected, rtol=1e-6, atol=1e-6)


@DTYPES
@KINDS
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["residual", "x", "both"])
@pytest.mark.parametrize("size", [1, 72, 576])
def test_norm(
    pool: Pool, isa: Isa, dtype: str, kind: NormKind, out_dtype: str, given: str, size: int
) -> None:
    rng = np.random.default_rng(size)
    start, added = rng.standard_normal((2, 5, size)).astype(np.float32)
    weight, bias = rng.standard_normal((2, size)).astype(np.float32)
    program = Program(pool, MAX_TOKENS, 1)
    values = {"out": program.value(size, out_dtype)}
    if given != "x":
        values["residual"] = program.value(size, "float32")
    if given != "residual":
        values["x"] = program.value(size, dtype)
    args = NormArgs(
        residual_stride=size,
        x_stride=size,
        weight=weight.ctypes.data,
        bias=bias.ctypes.data,
        out_stride=size,
        size=size,
        eps=1e-3,
        x_scale=0.5,
        kind=kind,
        dtype=values["x"].dtype_id if "x" in values else 0,
        out_dtype=values["out"].dtype_id,
    )
    program.append(OpKind.NORM, args, **values)
    part = finished(program, 5)
    seen = np.zeros((5, size), np.float32)
    if "x" in values:
        put(program, values["x"], added)
        seen += get(program, values["x"], 5)
    if "residual" in values:
        put(program, values["residual"], start)
        seen = start + np.float32(0.5) * seen
    program.run(part)
    if "residual" in values:
        assert np.allclose(get(program, values["residual"], 5), seen, rtol=1e-6, atol=1e-7)
    expected = normed(seen, kind, weight, bias, 1e-3)
    rtol = 1e-5 if out_dtype == "float32" else 2**-8
    np.testing.assert_allclose(get(program, values["out"], 5), expected, rtol=rtol, atol=2e-5)


@DTYPES
@KINDS
@pytest.mark.parametrize("is_shared", [True, False])
def test_slice_norm(pool: Pool, isa: Isa, dtype: str, kind: NormKind, is_shared: bool) -> None:
    """Three runs of 20 within rows of 80, from number 7 on."""
    rng = np.random.default_rng(12)
    weight = rng.standard_normal((1 if is_shared else 3, 20)).astype(np.float32)
    program = Program(pool, MAX_TOKENS, 1)
    x = program.value(80, dtype)
    args = SliceNormArgs(
        stride=80,
        first=7,
        num_runs=3,
        size=20,
        weight=weight.ctypes.data,
        weight_stride=0 if is_shared else 20,
        eps=1e-5,
        kind=kind,
        dtype=x.dtype_id,
    )
    program.append(OpKind.SLICE_NORM, args, x=x)
    part = finished(program, 6)
    put(program, x, rng.standard_normal((6, 80)))
    expected = get(program, x, 6)
    runs = expected[:, 7:67].reshape(6, 3, 20)
    expected[:, 7:67] = normed(runs, kind, weight, None, 1e-5).reshape(6, 60)
    program.run(part)
    atol = 1e-5 if dtype == "float32" else 2**-6
    np.testing.assert_allclose(get(program, x, 6), expected, atol=atol)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_rope(pool: Pool, isa: Isa, dtype: str, scale: float) -> None:
    """Of rows of four heads of 26, the heads 1 and 2; of each its numbers 3 to 23."""
    rng = np.random.default_rng(10)
    half, size = 10, 26
    frequencies = (100.0 ** -(np.arange(half) / half)).astype(np.float32)
    program = Program(pool, MAX_TOKENS, 1)
    angles, x = program.value(2 * half, "float32"), program.value(4 * size, dtype)
    angle_args = AnglesArgs(frequencies=frequencies.ctypes.data, half=half, scale=scale)
    program.append(OpKind.ANGLES, angle_args, out=angles)
    args = RopeArgs(
        stride=4 * size,
        half=half,
        first=size + 3,
        head_stride=size,
        num_heads=2,
        dtype=x.dtype_id,
    )
    program.append(OpKind.ROPE, args, angles=angles, x=x)
    positions = np.array([0, 1, 77, 3000, 5])
    part = finished(program, 5, positions=positions)
    put(program, x, rng.standard_normal((5, 4 * size)))
    expected = get(program, x, 5).reshape(5, 4, size).astype(np.float64)
    rotated = oracle.rotated(expected[:, 1:3, 3:23], positions, frequencies)
    expected[:, 1:3, 3:23] = scale * rotated
    program.run(part)
    after = get(program, x, 5).reshape(5, 4, size)
    atol = 1e-5 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(after, expected, atol=atol, rtol=atol)
    after[:, 1:3, 3:23] = expected[:, 1:3, 3:23] = 0
    assert np.array_equal(after, expected)  # the rest stays as it was


@DTYPES
def test_add(pool: Pool, isa: Isa, dtype: str) -> None:
    rng = np.random.default_rng(13)
    program = Program(pool, MAX_TOKENS, 1)
    residual, x = program.value(50, "float32"), program.value(50, dtype)
    args = AddArgs(residual_stride=50, x_stride=50, size=50, scale=-0.7, dtype=x.dtype_id)
    program.append(OpKind.ADD, args, residual=residual, x=x)
    part = finished(program, 4)
    start, added = rng.standard_normal((2, 4, 50)).astype(np.float32)
    put(program, residual, start)
    put(program, x, added)
    program.run(part)
    expected = start - np.float32(0.7) * get(program, x, 4)
    np.testing.assert_allclose(get(program, residual, 4), expected, rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("from_group_stride", [9, 0])
def test_copy_between_columns(pool: Pool, dtype: str, from_group_stride: int) -> None:
    """Three groups of five; a pointer may begin inside the rows of a value."""
    rng = np.random.default_rng(14)
    program = Program(pool, MAX_TOKENS, 1)
    source, target = program.value(30, dtype), program.value(40, dtype)
    args = CopyArgs(
        from_stride=30,
        from_group_stride=from_group_stride,
        to_stride=40,
        to_group_stride=12,
        num_groups=3,
        size=5,
        dtype=source.dtype_id,
    )
    columns: dict[str, Any] = {"from": source.columns(4), "to": target.columns(2)}
    program.append(OpKind.COPY, args, **columns)
    part = finished(program, 7)
    for value in (source, target):
        put(program, value, rng.standard_normal((7, value.width)))
    given, expected = get(program, source, 7), get(program, target, 7)
    for group in range(3):
        first = 4 + group * from_group_stride
        expected[:, 2 + 12 * group : 7 + 12 * group] = given[:, first : first + 5]
    program.run(part)
    assert np.array_equal(get(program, target, 7), expected)


@pytest.mark.parametrize(
    ("kind", "args", "told"),
    [
        (OpKind.ADD, AddArgs(size=8, residual_stride=8, x_stride=8), "scale"),
        (OpKind.COPY, CopyArgs(size=9, num_groups=1, from_stride=8, to_stride=8), "overlap"),
        (OpKind.ROPE, RopeArgs(stride=8, half=4, first=1, head_stride=8, num_heads=1), "overlap"),
        (OpKind.SLICE_NORM, SliceNormArgs(stride=8, first=3, num_runs=2, size=3), "overlap"),
        (OpKind.NORM, NormArgs(size=8, out_stride=8, x_stride=8, kind=9), "kind"),
    ],
)
def test_what_does_not_fit_is_refused(pool: Pool, kind: OpKind, args: Any, told: str) -> None:
    program = Program(pool, 4, 4)
    value = program.value(8, "float32")
    fields = {name for name, _ in args._fields_} & {"x", "out", "residual", "angles", "from", "to"}
    pointers: dict[str, Buffer] = dict.fromkeys(fields, value)
    program.append(kind, args, **pointers)
    program.end_part()
    with pytest.raises(EngineError, match=told):
        program.finish()

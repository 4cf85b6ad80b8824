"""Matrices of codes, packed as they are: the library's rows are what `values_of` says, exactly.

The kernels have tests of their own in csrc/tests; here it counts that what Python hands over is
what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import ops_oracle as oracle
import pytest
from numpy.typing import NDArray
from ops_program import F32, get, put, step_of

from penstock.errors import EngineError
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.native.structs import EmbedArgs, Isa, LinearArgs, OpKind
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization.codes import CodedTensor, CodeForm, CodeRows
from penstock.quantization.schemes import Format, coded

FORMS = [
    CodeForm("int4", 32, "float16"),  # Q4_0
    CodeForm("uint4", 32, "int8", has_minima=True),  # Q4_K
    CodeForm("uint4", 16, "int8", has_minima=True),  # Q2_K
    CodeForm("uint4", 128, has_minima=True),  # GPTQ
    CodeForm("nf4", 64),
    CodeForm("fp4", 32),
    CodeForm("int8", 32, "float16"),  # Q8_0
    CodeForm("int8", 16, "int8"),  # Q6_K
    CodeForm("uint8", 0, has_minima=True),
    CodeForm("e4m3", 128),
    CodeForm("e5m2", 0),
]
SHAPES = [(37, 256), (16, 768), (3, 1280)]


def some_rows(form: CodeForm, num_rows: int, num_columns: int, seed: int) -> CodeRows:
    """Random codes, NaN among them where there are any."""
    generator = np.random.default_rng(seed)
    is_integer = form.scales == "int8"
    groups = -(-num_columns // (form.group_size or num_columns))

    def scales(low: int) -> F32:
        integers = generator.integers(low, low + 256, (num_rows, groups)).astype(np.float32)
        return integers if is_integer else integers / np.float32(256)

    def units() -> F32:
        return generator.standard_normal((num_rows, -(-num_columns // 256)), np.float32)

    return CodeRows(
        generator.integers(0, 2**form.bits, (num_rows, num_columns), np.uint8),
        scales(-128),
        scales(0) if form.has_minima else None,
        units() if is_integer else None,
        units() if is_integer and form.has_minima else None,
    )


def tensor_of(form: CodeForm, rows: CodeRows) -> CodedTensor:
    def read(first: int, last: int) -> CodeRows:
        parts = (None if part is None else part[first:last] for part in rows)
        return CodeRows(*parts)

    num_rows, num_columns = rows.codes.shape
    return CodedTensor("a.weight", form, (num_rows, num_columns), 0, read)


def some_tensor(form: CodeForm, num_rows: int, num_columns: int, seed: int = 0) -> CodedTensor:
    return tensor_of(form, some_rows(form, num_rows, num_columns, seed))


def packed(pool: Pool, form: Format, tensor: CodedTensor) -> PackedWeight:
    weight = PackedWeight(pool, form, *tensor.shape, Arena())
    weight.pack_codes(tensor, Placement())
    return weight


def rows_of(pool: Pool, weight: PackedWeight, ids: NDArray[np.int64]) -> F32:
    """Rows of a packed matrix as the embedding reads them."""
    width = weight.num_columns
    program = Program(pool, len(ids), 1)
    out = program.value(width, "float32")
    program.append(OpKind.EMBED, EmbedArgs(table=weight.struct, out_stride=width, scale=1), out=out)
    part = program.end_part()
    program.finish()
    program.set_step(step_of(len(ids), ids))
    program.run(part)
    return get(program, out, len(ids))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows(pool: Pool, form: CodeForm, shape: tuple[int, int]) -> None:
    tensor = some_tensor(form, *shape)
    rows = rows_of(pool, packed(pool, coded(form), tensor), np.arange(shape[0]))
    np.testing.assert_array_equal(rows, tensor.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear(pool: Pool, isa: Isa, form: CodeForm, dtype: str) -> None:
    rows = some_rows(form, 37, 512, 1)
    if form.bits == 8:
        rows = rows._replace(codes=np.where(rows.codes & 0x7F > 0x7B, 3, rows.codes))  # finite
    tensor = tensor_of(form, rows)
    weight = packed(pool, coded(form), tensor)
    program = Program(pool, 20, 1)
    x, y = program.value(512, dtype), program.value(37, "float32")
    args = LinearArgs(
        weight=weight.struct,
        x_stride=512,
        y_stride=37,
        x_dtype=x.dtype_id,
        y_dtype=y.dtype_id,
        num_groups=1,
        activation_bits=16,
        num_outputs=37,
        y_scale=1.0,
    )
    program.append(OpKind.LINEAR, args, x=x, y=y)
    part = program.end_part()
    program.finish()
    for num_tokens in (1, 20):
        put(program, x, np.random.default_rng(2).standard_normal((num_tokens, 512), np.float32))
        program.set_step(step_of(num_tokens))
        program.run(part)
        seen = get(program, x, num_tokens).astype(np.float64)
        matrix = tensor.values()
        matrix = (oracle.rounded(matrix) if dtype == "bfloat16" else matrix).astype(np.float64)
        error = np.abs(get(program, y, num_tokens) - seen @ matrix.T)
        assert (error <= np.abs(seen) @ np.abs(matrix.T) * 512 * 2**-24).all()


def test_parts_and_chunks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts begin anywhere or take turns, and are read 16 rows at a time."""
    monkeypatch.setattr("penstock.native.weights._CHUNK_BYTES", 1)
    form = FORMS[1]
    parts = [some_tensor(form, num_rows, 256, num_rows) for num_rows in (40, 7, 50)]
    joined = PackedWeight(pool, coded(form), 97, 256, Arena())
    for first, part in zip((0, 40, 47), parts, strict=True):
        joined.pack_codes(part, Placement(first))
    expected = np.concatenate([part.values() for part in parts])
    np.testing.assert_array_equal(rows_of(pool, joined, np.arange(97)), expected)

    pair = PackedWeight(pool, coded(form), 96, 256, Arena())
    for first in (0, 16):
        pair.pack_codes(parts[0], Placement(first, 2))
        rows = rows_of(pool, pair, Placement(first, 2).rows(40))
        np.testing.assert_array_equal(rows, parts[0].values())


def test_whole_rows_of_int8(pool: Pool) -> None:
    tensor = some_tensor(CodeForm("int8", 0), 33, 100)
    weight = packed(pool, coded(tensor.form, activation_bits=8), tensor)
    assert weight.form == Format("int8")
    np.testing.assert_array_equal(rows_of(pool, weight, np.arange(33)), tensor.values())


def test_other_forms_are_refused(pool: Pool) -> None:
    weight = PackedWeight(pool, coded(FORMS[0]), 16, 256, Arena())
    for tensor in (some_tensor(FORMS[1], 16, 256), some_tensor(FORMS[0], 16, 512)):
        with pytest.raises(EngineError, match=r"`a\.weight` has the form"):
            weight.pack_codes(tensor, Placement())
    with pytest.raises(EngineError, match="do not fit"):
        weight.pack_codes(some_tensor(FORMS[0], 17, 256), Placement())
    with pytest.raises(EngineError, match="has the form"):
        PackedWeight(pool, Format("int8"), 16, 256, Arena()).pack_codes(
            some_tensor(CodeForm("int8", 32), 16, 256), Placement()
        )
    for group_size in (8, 48, -32):
        with pytest.raises(EngineError, match="groups of codes"):
            PackedWeight(pool, coded(CodeForm("int4", group_size)), 16, 256, Arena())


def test_wrong_arrays_are_refused(pool: Pool) -> None:
    """What a checkpoint gets wrong is an error that names it, and nothing is read beyond an end."""
    form = FORMS[1]
    weight = PackedWeight(pool, coded(form), 16, 256, Arena())
    good = some_rows(form, 16, 256, 0)
    spoil: dict[str, Callable[[F32], F32 | None]] = {
        "codes": lambda x: x[:, 1:],
        "scales": lambda x: x[:, 1:],
        "minima": lambda x: None,
        "units": lambda x: x[1:],
        "minimum_units": lambda x: x[0],
    }
    for field, change in spoil.items():
        rows = good._replace(**{field: change(getattr(good, field))})
        tensor = replace(tensor_of(form, good), rows=lambda first, last, rows=rows: rows)
        with pytest.raises(EngineError, match=rf"`a\.weight`.*`{field}` of its codes"):
            weight.pack_codes(tensor, Placement())
    for rows, reason in (
        (good._replace(codes=good.codes + np.uint8(16)), "row 0 .* more than 4 bits"),
        (good._replace(scales=good.scales + np.float32(0.5)), "row 0 .* does not hold"),
    ):
        with pytest.raises(EngineError, match=rf"`a\.weight`, rows `0` to `15`: .*{reason}"):
            weight.pack_codes(tensor_of(form, rows), Placement())

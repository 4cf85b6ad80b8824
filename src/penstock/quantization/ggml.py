"""The block formats of ggml, as codes with scales.

Owns how a block of each type is laid out (https://github.com/ggml-org/ggml: `ggml-common.h` has the
structures, `dequantize_row_...` of `ggml-quants.c` their meaning; MXFP4 is of OCP's Microscaling
Formats, 2023). Knows no file and no model. Only the rows that are asked for are decoded.

Invariant: `values` of a tensor are bit for bit what ggml's own reference decodes. One kind of block
is out of that: an MXFP4 block with the exponent 255, which the standard calls NaN, is NaN here;
ggml goes on counting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.gguf.header import shown
from penstock.gguf.types import BY_NAME
from penstock.quantization.codes import (
    F32,
    U8,
    CodedTensor,
    CodeForm,
    CodeRows,
    StoredTensor,
)

Blocks = NDArray[np.void]  # [n] blocks, the fields of which are those of ggml's structures
PLAIN = frozenset({"F32", "F16", "BF16"})  # types that need no decoding


class _Decoded(NamedTuple):
    """Blocks as `CodeRows` has rows: [n, whatever belongs to a block]."""

    codes: U8
    scales: F32
    minima: F32 | None = None
    units: F32 | None = None
    minimum_units: F32 | None = None


class _Format(NamedTuple):
    """A type of blocks: what it comes down to, its fields in order, and who decodes them."""

    form: CodeForm
    fields: tuple[tuple[str, str, int], ...]
    decode: Callable[[Blocks], _Decoded]

    def dtype(self) -> np.dtype[Any]:
        """A block. Its fields need not be aligned."""
        return np.dtype([(name, kind, (size,)) for name, kind, size in self.fields])


def form_of(type_name: str) -> CodeForm | None:
    """What the codes of a type mean; None where there is no such type of codes."""
    found = _FORMATS.get(type_name)
    return None if found is None else found.form


def check(name: str, type_name: str) -> None:
    """Refuse a tensor of a type that is not read.

    Raises:
        ModelLoadError: it is one.
    """
    if type_name not in PLAIN and type_name not in _FORMATS:
        raise ModelLoadError(
            f"`{shown(name)}` is of ggml's type `{shown(type_name)}`, which is not read.",
            hint=f"read are {', '.join(sorted(PLAIN))} and {', '.join(sorted(_FORMATS))}.",
        )


def tensor(
    name: str,
    type_name: str,
    shape: tuple[int, ...],
    data: U8,
    order: NDArray[np.int64] | None = None,
) -> StoredTensor | CodedTensor:
    """A tensor of a GGUF file: plain, or see `coded`. A plain one in another order is a copy."""
    if type_name not in PLAIN:
        return coded(name, type_name, shape, data, order)
    if order is not None:
        data = data.reshape(shape[0], -1)[order].reshape(-1)
    return StoredTensor(name, type_name, shape, data)


def coded(
    name: str,
    type_name: str,
    shape: tuple[int, ...],
    data: U8,
    order: NDArray[np.int64] | None = None,
) -> CodedTensor:
    """A matrix of a GGUF file.

    Args:
        name: of the weight that it is.
        type_name: ggml's.
        shape: row-major, of two sizes.
        data: its bytes, as many as type and shape say.
        order: which row of `data` is each row, [N], where they are to be in another order.

    Raises:
        ModelLoadError: the type is not read, or it is no matrix.
    """
    check(name, type_name)
    found = _FORMATS[type_name]
    if len(shape) != 2:
        raise ModelLoadError(
            f"`{shown(name)}` is of type `{type_name}` and shape `{shape}`; only matrices are."
        )
    num_rows, num_columns = shape
    row_bytes = BY_NAME[type_name].row_bytes(num_columns)
    assert data.size == num_rows * row_bytes
    rows = partial(_rows, found, data.reshape(num_rows, row_bytes), num_columns, order)
    return CodedTensor(name, found.form, (num_rows, num_columns), data.size, rows)


def _rows(
    found: _Format,
    data: U8,
    num_columns: int,
    order: NDArray[np.int64] | None,
    first: int,
    last: int,
) -> CodeRows:
    taken = data[first:last] if order is None else data[order[first:last]]
    decoded = found.decode(taken.reshape(-1).view(found.dtype()))
    num_blocks = taken.shape[1] // found.dtype().itemsize  # of a row

    def by_row(numbers: Any) -> Any:
        if numbers is None:
            return None
        return numbers.reshape(len(taken), num_blocks * numbers.shape[1])

    return CodeRows(
        decoded.codes.reshape(len(taken), num_columns),
        by_row(decoded.scales),
        by_row(decoded.minima),
        by_row(decoded.units),
        by_row(decoded.minimum_units),
    )


def _floats(numbers: NDArray[Any]) -> F32:
    return numbers.astype(np.float32)


def _parts(packed: U8, run: int, bits: int) -> U8:
    """Codes of 1, 2 or 4 bits, [n, 8 / bits * m]: the lowest bits of a run of bytes come first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    num_blocks, num_bytes = packed.shape
    parts = packed.reshape(num_blocks, num_bytes // run, 1, run) >> shifts
    parts &= np.uint8(2**bits - 1)
    return parts.reshape(num_blocks, num_bytes * 8 // bits)


def _fifth_bits(packed: U8) -> U8:
    """The bits of [n, 4] bytes, [n, 32], each moved to its place in a code of five."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Blocks) -> _Decoded:
    # q - 8 in two's complement of four bits is q with its highest bit turned over.
    return _Decoded(_parts(blocks["qs"], 16, 4) ^ np.uint8(8), _floats(blocks["d"]))


def _q4_1(blocks: Blocks) -> _Decoded:
    return _Decoded(_parts(blocks["qs"], 16, 4), _floats(blocks["d"]), _floats(blocks["m"]))


def _q5_0(blocks: Blocks) -> _Decoded:
    codes = _parts(blocks["qs"], 16, 4) | _fifth_bits(blocks["qh"])
    return _Decoded(codes - np.uint8(16), _floats(blocks["d"]))  # wraps: two's complement


def _q5_1(blocks: Blocks) -> _Decoded:
    codes = _parts(blocks["qs"], 16, 4) | _fifth_bits(blocks["qh"])
    return _Decoded(codes, _floats(blocks["d"]), _floats(blocks["m"]))


def _q8_0(blocks: Blocks) -> _Decoded:
    return _Decoded(np.ascontiguousarray(blocks["qs"]), _floats(blocks["d"]))


def _q2_k(blocks: Blocks) -> _Decoded:
    return _Decoded(
        _parts(blocks["qs"], 32, 2),
        _floats(blocks["scales"] & np.uint8(15)),
        _floats(blocks["scales"] >> np.uint8(4)),
        _floats(blocks["d"]),
        -_floats(blocks["dmin"]),
    )


def _q3_k(blocks: Blocks) -> _Decoded:
    # A code of two bits, less 4 where the bit of the mask is clear: in two's complement of four
    # bits, with its two highest bits set.
    clear = _parts(blocks["hmask"], 32, 1) ^ np.uint8(1)
    codes = _parts(blocks["qs"], 32, 2) | clear * np.uint8(12)
    low = _parts(blocks["scales"][:, :8], 8, 4)
    high = _parts(blocks["scales"][:, 8:], 4, 2)
    scales = _floats(low | high << np.uint8(4)) - np.float32(32)
    return _Decoded(codes, scales, units=_floats(blocks["d"]))


def _six_bits(packed: U8) -> tuple[U8, U8]:
    """Eight scales and eight minima of six bits each, out of [n, 12] bytes."""
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    top = np.uint8(0x30)
    return (
        np.hstack([scales & np.uint8(63), rest & np.uint8(15) | scales >> np.uint8(2) & top]),
        np.hstack([minima & np.uint8(63), rest >> np.uint8(4) | minima >> np.uint8(2) & top]),
    )


def _q4_k(blocks: Blocks) -> _Decoded:
    return _with_six_bits(_parts(blocks["qs"], 32, 4), blocks)


def _q5_k(blocks: Blocks) -> _Decoded:
    high = _parts(blocks["qh"], 32, 1) << np.uint8(4)
    return _with_six_bits(_parts(blocks["qs"], 32, 4) | high, blocks)


def _with_six_bits(codes: U8, blocks: Blocks) -> _Decoded:
    scales, minima = _six_bits(blocks["scales"])
    units, minimum_units = _floats(blocks["d"]), -_floats(blocks["dmin"])
    return _Decoded(codes, _floats(scales), _floats(minima), units, minimum_units)


def _q6_k(blocks: Blocks) -> _Decoded:
    codes = _parts(blocks["ql"], 64, 4) | _parts(blocks["qh"], 32, 2) << np.uint8(4)
    scales, units = _floats(blocks["scales"]), _floats(blocks["d"])
    return _Decoded(codes - np.uint8(32), scales, units=units)  # wraps: two's complement


def _mxfp4(blocks: Blocks) -> _Decoded:
    codes = _parts(blocks["qs"], 16, 4)
    codes[codes == 8] = 0  # ggml has no negative zero
    return _Decoded(codes, _POWERS[blocks["e"]])


def _powers_of_two() -> F32:
    """2 ** (e - 127) for each byte e, where the last one stands for NaN."""
    powers = np.full(256, np.nan, np.float32)
    powers[:255] = 2.0 ** (np.arange(255) - 127.0)
    return powers


_POWERS = _powers_of_two()
_FORMATS: dict[str, _Format] = {
    "Q4_0": _Format(CodeForm("int4", 32, "float16"), (("d", "<f2", 1), ("qs", "u1", 16)), _q4_0),
    "Q4_1": _Format(
        CodeForm("uint4", 32, "float16", has_minima=True),
        (("d", "<f2", 1), ("m", "<f2", 1), ("qs", "u1", 16)),
        _q4_1,
    ),
    "Q5_0": _Format(
        CodeForm("int8", 32, "float16"),
        (("d", "<f2", 1), ("qh", "u1", 4), ("qs", "u1", 16)),
        _q5_0,
    ),
    "Q5_1": _Format(
        CodeForm("uint8", 32, "float16", has_minima=True),
        (("d", "<f2", 1), ("m", "<f2", 1), ("qh", "u1", 4), ("qs", "u1", 16)),
        _q5_1,
    ),
    "Q8_0": _Format(CodeForm("int8", 32, "float16"), (("d", "<f2", 1), ("qs", "u1", 32)), _q8_0),
    "Q2_K": _Format(
        CodeForm("uint4", 16, "int8", has_minima=True),
        (("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2", 1), ("dmin", "<f2", 1)),
        _q2_k,
    ),
    "Q3_K": _Format(
        CodeForm("int4", 16, "int8"),
        (("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2", 1)),
        _q3_k,
    ),
    "Q4_K": _Format(
        CodeForm("uint4", 32, "int8", has_minima=True),
        (("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qs", "u1", 128)),
        _q4_k,
    ),
    "Q5_K": _Format(
        CodeForm("uint8", 32, "int8", has_minima=True),
        (
            ("d", "<f2", 1),
            ("dmin", "<f2", 1),
            ("scales", "u1", 12),
            ("qh", "u1", 32),
            ("qs", "u1", 128),
        ),
        _q5_k,
    ),
    "Q6_K": _Format(
        CodeForm("int8", 16, "int8"),
        (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1)),
        _q6_k,
    ),
    "MXFP4": _Format(CodeForm("fp4", 32), (("e", "u1", 1), ("qs", "u1", 16)), _mxfp4),
}

"""Tensors of a checkpoint: plain ones, and matrices that are stored as codes.

Owns `StoredTensor`, `CodeForm` (what a code means) and `CodedTensor` (a matrix of codes with its
scales). Every quantized format that is read (GGUF's, GPTQ, AWQ, compressed-tensors, fp8, nf4,
MXFP4) is a file of this package that makes one; backends pack it, or take `values`. Imports neither
torch nor the native library.

Invariant: `values` is the definition: value = book(code) * scale + minimum in float32, rounded
after the product and after the sum, with scale and minimum those of the code's group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.quantization.forms import UNIT_COLUMNS, Code, CodeForm

__all__ = ["UNIT_COLUMNS", "Code", "CodeForm"]  # what a code means, for those who have codes

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


class StoredTensor(NamedTuple):
    """One tensor as a checkpoint holds it."""

    name: str
    dtype: str  # as safetensors names it; what a model takes is "F32", "F16" or "BF16"
    shape: tuple[int, ...]
    data: U8  # its bytes, 1-D, row-major, little-endian; never to be written
    is_mapped: bool = False  # of a file: its pages may be given back, and are read anew

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return self.data.nbytes


class CutTensor(NamedTuple):
    """A part of a stored tensor whose bytes do not lie together: copied when it is asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numbers: NDArray[Any]  # a view of `shape`

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return self.numbers.nbytes

    def copied(self) -> StoredTensor:
        """It as a tensor of its own."""
        data = np.ascontiguousarray(self.numbers).reshape(-1).view(np.uint8)
        return StoredTensor(self.name, self.dtype, self.shape, data)


class CodeRows(NamedTuple):
    """Some rows: codes, one to a byte, and what they are multiplied with. G: groups of a row."""

    codes: U8  # [n, K]; a 4-bit code is 0..15, a signed one in two's complement of its bits
    scales: F32  # [n, G]; of "int8" scales the integers, as float32
    minima: F32 | None = None  # [n, G], likewise
    units: F32 | None = None  # [n, K / 256, rounded up], of "int8" scales
    minimum_units: F32 | None = None  # [n, K / 256, rounded up], of "int8" scales with minima

    def flat_scales(self) -> F32:
        """The scale of each group as one number, [n, G]: exact in float32."""
        return _flat(self.scales, self.units, self.codes.shape[1])

    def flat_minima(self) -> F32 | None:
        """The minimum of each group, [n, G]."""
        return (
            None
            if self.minima is None
            else _flat(self.minima, self.minimum_units, self.codes.shape[1])
        )


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """One matrix of a checkpoint, [N, K], whose numbers are codes. `rows` reads them."""

    name: str  # of the weight that it is, as a plain checkpoint would call it: "....weight"
    form: CodeForm
    shape: tuple[int, int]
    num_bytes: int  # in the file
    rows: Callable[[int, int], CodeRows]  # rows [first, last)

    def values(self, first: int = 0, last: int | None = None) -> F32:
        """Rows [first, last) as numbers, [n, K]."""
        rows = self.rows(first, self.shape[0] if last is None else last)
        return values_of(self.form, rows)

    def arranged(self, index: NDArray[np.int64]) -> CodedTensor:
        """The matrix whose rows are those of `index` [n], in that order."""
        take = partial(_take, self.rows, index, self.shape[0])
        return replace(self, shape=(len(index), self.shape[1]), rows=take)


Stored = StoredTensor | CodedTensor  # what a leaf takes
Found = Stored | CutTensor  # what a checkpoint has


def values_of(form: CodeForm, rows: CodeRows) -> F32:
    """Numbers [n, K] of coded rows."""
    numbers = book(form.code)[rows.codes]
    group_size = form.group_size or max(numbers.shape[1], 1)
    numbers *= np.repeat(rows.flat_scales(), group_size, 1)[:, : numbers.shape[1]]
    minima = rows.flat_minima()
    if minima is not None:
        numbers += np.repeat(minima, group_size, 1)[:, : numbers.shape[1]]
    return numbers


def book(code: Code) -> F32:
    """The number that each code stands for, [16] or [256]."""
    return _BOOKS[code]


def _flat(integers: F32, units: F32 | None, num_columns: int) -> F32:
    if units is None:
        return integers
    group_size = -(-num_columns // max(integers.shape[1], 1))
    groups = UNIT_COLUMNS // max(group_size, 1)
    return integers * np.repeat(units, groups, 1)[:, : integers.shape[1]]


def _take(
    rows: Callable[[int, int], CodeRows],
    index: NDArray[np.int64],
    num_rows: int,
    first: int,
    last: int,
) -> CodeRows:
    wanted = index[first:last]
    if len(wanted) == 0:
        low, high = 0, 0
    else:
        low, high = int(wanted.min()), int(wanted.max()) + 1
    found = rows(low, high)
    at = wanted - low
    return CodeRows(
        found.codes[at],
        found.scales[at],
        None if found.minima is None else found.minima[at],
        None if found.units is None else found.units[at],
        None if found.minimum_units is None else found.minimum_units[at],
    )


def _float8(exponent_bits: int, mantissa_bits: int, bias: int) -> F32:
    """All 256 numbers of an 8-bit float without infinities handled apart (see `_BOOKS`)."""
    codes = np.arange(256)
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    normal = (1 + mantissa) * 2.0 ** (exponent - bias)
    numbers = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal)
    made: F32 = (sign * numbers).astype(np.float32)
    return made


def _e4m3() -> F32:
    """float8_e4m3fn (Micikevicius et al. 2022): no infinity, NaN where all bits are set."""
    numbers = _float8(4, 3, 7)
    numbers[[0x7F, 0xFF]] = np.nan
    return numbers


def _e5m2() -> F32:
    """float8_e5m2: infinities and NaN as in IEEE 754."""
    numbers = _float8(5, 2, 15)
    numbers[[0x7C, 0xFC]] = np.inf, -np.inf
    numbers[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return numbers


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 (OCP Microscaling Formats, 2023)
# The quantiles of a normal distribution (QLoRA, Dettmers et al. 2023).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BOOKS: dict[Code, F32] = {
    "uint4": np.arange(16, dtype=np.float32),
    "int4": np.r_[np.arange(8), np.arange(-8, 0)].astype(np.float32),
    "fp4": np.array([*_FP4, *(-number for number in _FP4)], np.float32),
    "nf4": np.array(_NF4, np.float32),
    "uint8": np.arange(256, dtype=np.float32),
    "int8": np.r_[np.arange(128), np.arange(-128, 0)].astype(np.float32),
    "e4m3": _e4m3(),
    "e5m2": _e5m2(),
}

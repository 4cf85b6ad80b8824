"""Random matrices of codes, for models whose weights are drawn instead of read.

Owns that they are numbers that such a format can hold. Knows no format by name.
Invariant: a matrix follows from its seed, its form and its shape, whatever rows are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from penstock.quantization.codes import CodedTensor, CodeForm, CodeRows
from penstock.quantization.forms import UNIT_COLUMNS

_LARGEST_INTEGER = 64.0  # of integer scales, which have six bits and more


def drawn(
    name: str, form: CodeForm, shape: tuple[int, int], seed: Sequence[int], spread: float
) -> CodedTensor:
    """Random codes [N, K] whose numbers have about the standard deviation `spread`."""
    num_rows, num_columns = shape
    rng = np.random.default_rng(seed)
    book = form.numbers
    usable = np.flatnonzero(np.abs(book) <= 16 if form.bits == 8 else np.isfinite(book))
    codes = usable.astype(np.uint8)[rng.integers(0, len(usable), shape, np.uint16)]
    middle, deviation = float(book[usable].mean()), float(book[usable].std())
    unit = np.float32(np.exp2(np.round(np.log2(spread / deviation))))  # exact in every format
    group_size = form.group_size or max(num_columns, 1)
    groups = (num_rows, -(-num_columns // group_size))
    least, most = (_LARGEST_INTEGER / 2, _LARGEST_INTEGER) if form.scales == "int8" else (8, 24)
    factors = rng.integers(int(least), int(most), groups).astype(np.float32)
    center = np.float32(-middle if form.has_minima else 0.0)
    if form.scales == "int8":
        units = np.full((num_rows, -(-num_columns // UNIT_COLUMNS)), unit * 4 / _LARGEST_INTEGER)
        units = units.astype(np.float32) / np.float32(3)
        minima = factors if form.has_minima else None
        minimum_units = units * center if form.has_minima else None
        rows = CodeRows(codes, factors, minima, units, minimum_units)
    else:
        scales = factors * (unit / np.float32(16))
        rows = CodeRows(codes, scales, scales * center if form.has_minima else None)
    return CodedTensor(name, form, shape, codes.nbytes * form.bits // 8, partial(_rows, rows))


def _rows(rows: CodeRows, first: int, last: int) -> CodeRows:
    return CodeRows(*(None if part is None else part[first:last] for part in rows))  # type: ignore[arg-type]

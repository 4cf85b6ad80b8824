"""Matrices of a model in the memory of a device, in every number format, and their products.

Owns what a format's numbers are made of there and which operation multiplies them. Knows tensors;
knows neither checkpoints nor what a matrix is for.
Invariant: rows are quantized as they come, so that no 16-bit copy of a model ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch.nn import functional

from penstock.kernels import fp8_matmul as fp8
from penstock.kernels import int_matmul as integers
from penstock.kernels.fp8_matmul import fp8_matmul
from penstock.kernels.int_matmul import int_matmul
from penstock.kernels.int_words import pack, weights_of
from penstock.kernels.jit import INTERPRETED
from penstock.kernels.op import mode
from penstock.kernels.quantize_fp8 import quantize_fp8
from penstock.quantization import encode
from penstock.quantization.schemes import DEVICE_COLUMNS, Format

_RUN = 32  # columns that a factor of int4 is stored for, whatever the size of groups
_NUMBERS_AT_ONCE = 2**22  # that are quantized; the arithmetic takes some 40 bytes for each


class DeviceWeight(Protocol):
    """A matrix W [num_rows, num_columns].

    Rows that are not filled are zeros: those that fill up the last share of a table, for example.
    """

    num_rows: int
    num_columns: int

    def fill(self, first_row: int, values: torch.Tensor) -> None:
        """Take in rows [first_row, first_row + n): values [n, num_columns], quantized at once.

        Calls come in any order and never name a row twice. `values` are on the weight's device, of
        any floating type, and are not kept.

        Raises:
            EngineError: a row that is to be quantized has NaN or an infinity.
        """

    def finish(self) -> None:
        """All rows are in. Called once, before the first product."""

    def warm_up(self, bias: torch.Tensor | None = None) -> None:
        """Let no product with such a bias, of any number of tokens, wait for a compiler."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [T, num_columns] to x W^T + bias, [T, num_rows], in the type of x."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ids [n], as the model's numbers, [n, num_columns]: an embedding."""

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""


def make_weight(
    form: Format, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device | str
) -> DeviceWeight:
    """Memory for a matrix in that format, of a model that computes in `dtype`."""
    match form.dtype, form.group_size:
        case (("int8" | "int4"), _):
            return Integers(form, num_rows, num_columns, dtype, device)
        case "fp8", 0:
            return Fp8(num_rows, num_columns, dtype, device)
        case "fp8", _:
            return Fp8Blocks(num_rows, num_columns, dtype, device)
    return Dense(num_rows, num_columns, dtype, device)


class Dense:
    """The numbers as they are; the vendor's library multiplies them."""

    def __init__(
        self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_rows = num_rows
        self.num_columns = num_columns
        self.values = torch.zeros(num_rows, num_columns, dtype=dtype, device=device)

    def fill(self, first_row: int, values: torch.Tensor) -> None:
        """Take in rows, rounded to the model's type."""
        self.values[first_row : first_row + len(values)].copy_(values)

    def finish(self) -> None:
        """Nothing to derive."""

    def warm_up(self, bias: torch.Tensor | None = None) -> None:
        """Nothing to compile."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias."""
        return functional.linear(x, self.values, bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids."""
        return functional.embedding(ids, self.values)

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""
        return self.values.nbytes


class Integers:
    """8-bit or 4-bit integers, padded to 128 columns; activations stay what they are.

    The numbers are those of the native library in the same format (QServe, Lin et al. 2024).
    """

    def __init__(
        self,
        form: Format,
        num_rows: int,
        num_columns: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._bits = 4 if form.dtype == "int4" else 8
        self._group_size = form.group_size
        self._dtype = dtype
        self._padded = -(-num_columns // DEVICE_COLUMNS) * DEVICE_COLUMNS
        words = self._padded * self._bits // 16
        self._packed = torch.zeros(num_rows, words, dtype=torch.int16, device=device)
        self._row_scales = torch.zeros(num_rows, device=device)
        self._factors: torch.Tensor | None = None
        if self._bits == 4:
            shape = (self._padded // DEVICE_COLUMNS, num_rows, DEVICE_COLUMNS // _RUN)
            self._factors = torch.zeros(shape, dtype=torch.uint8, device=device)

    def fill(self, first_row: int, values: torch.Tensor) -> None:
        """Quantize and pack rows."""
        for first, part in _in_parts(first_row, values):
            rows = slice(first, first + len(part))
            if self._factors is None:
                q, self._row_scales[rows] = encode.int8(part)
            else:
                q, factors, self._row_scales[rows] = encode.int4(part, self._group_size)
                q += 8
                factors = factors.repeat_interleave(self._group_size // _RUN, 1)
                factors = functional.pad(factors, (0, self._padded // _RUN - factors.shape[1]))
                runs = factors.view(len(part), -1, DEVICE_COLUMNS // _RUN)
                self._factors[:, rows] = runs.transpose(0, 1)
            q = functional.pad(q, (0, self._padded - q.shape[1]))
            self._packed[rows] = pack(q, self._bits)

    def finish(self) -> None:
        """Nothing to derive."""

    def warm_up(self, bias: torch.Tensor | None = None) -> None:
        """Compute a product for each tiling."""
        for num_tokens in _compiled(integers.FIRST_TOKENS):
            self(self._row_scales.new_zeros(num_tokens, self.num_columns, dtype=self._dtype), bias)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias."""
        return int_matmul(
            x,
            self._packed,
            self._factors,
            None,
            bits=self._bits,
            group_size=_RUN if self._bits == 4 else 0,
            row_scales=self._row_scales,
            bias=bias,
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids."""
        factors = None if self._factors is None else self._factors[:, ids]
        values = weights_of(self._packed[ids], factors, None, self._bits, _RUN, torch.float32)
        values *= self._row_scales[ids][:, None]
        return values[:, : self.num_columns].to(self._dtype)

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""
        factor_bytes = 0 if self._factors is None else self._factors.nbytes
        return self._packed.nbytes + self._row_scales.nbytes + factor_bytes


class Fp8:
    """float8_e4m3fn with a scale a row; activations are quantized, a scale a token."""

    def __init__(
        self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._dtype = dtype
        self._values = _fp8_zeros(num_rows, num_columns, device)
        self._scales = torch.zeros(num_rows, device=device)

    def fill(self, first_row: int, values: torch.Tensor) -> None:
        """Quantize rows."""
        for first, part in _in_parts(first_row, values):
            rows = slice(first, first + len(part))
            self._values[rows], self._scales[rows] = encode.fp8(part)

    def finish(self) -> None:
        """Nothing to derive."""

    def warm_up(self, bias: torch.Tensor | None = None) -> None:
        """Compute a product for each tiling."""
        for num_tokens in _compiled(fp8.FIRST_TOKENS):
            self(self._scales.new_zeros(num_tokens, self.num_columns, dtype=self._dtype), bias)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias."""
        x8, x_scale = quantize_fp8(x, 0)
        return fp8_matmul(x8, x_scale, self._values, self._scales, out_dtype=x.dtype, bias=bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids."""
        return (_fp8_rows(self._values, ids) * self._scales[ids][:, None]).to(self._dtype)

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""
        return self._values.nbytes + self._scales.nbytes


class Fp8Blocks:
    """float8_e4m3fn with a scale for 128 rows and columns; activations: for 128 columns of a token.

    A block may be made of rows of several parts. Those of one that is not complete wait.
    """

    def __init__(
        self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._dtype = dtype
        self._values = _fp8_zeros(num_rows, num_columns, device)
        shape = (-(-num_rows // encode.BLOCK), -(-num_columns // encode.BLOCK))
        self._scales = torch.zeros(shape, device=device)
        self._waiting: dict[int, tuple[torch.Tensor, int]] = {}  # rows, how many are filled

    def fill(self, first_row: int, values: torch.Tensor) -> None:
        """Quantize the blocks that are complete; keep the other rows."""
        place, end = first_row, first_row + len(values)
        while place < end:
            block, inside = divmod(place, encode.BLOCK)
            if inside == 0 and (whole := self._whole_blocks(place, end)):
                part = values[place - first_row : place - first_row + whole]
                for first, some in _in_parts(place, part, encode.BLOCK):
                    self._encode(first, some)
                place += whole
                continue
            stop = min(end, (block + 1) * encode.BLOCK)
            self._keep(block, inside, values[place - first_row : stop - first_row])
            place = stop

    def _whole_blocks(self, first_row: int, end: int) -> int:
        """How many of the rows from the start of a block are of complete blocks."""
        count = end - first_row
        return count if end == self.num_rows else count // encode.BLOCK * encode.BLOCK

    def _keep(self, block: int, inside: int, values: torch.Tensor) -> None:
        size = min(encode.BLOCK, self.num_rows - block * encode.BLOCK)
        rows, count = self._waiting.pop(block, (None, 0))
        if rows is None:
            rows = values.new_zeros(size, self.num_columns)
        rows[inside : inside + len(values)] = values
        count += len(values)
        if count == size:
            self._encode(block * encode.BLOCK, rows)
        else:
            self._waiting[block] = rows, count

    def _encode(self, first_row: int, values: torch.Tensor) -> None:
        first = first_row // encode.BLOCK
        blocks = slice(first, first + -(-len(values) // encode.BLOCK))
        rows = slice(first_row, first_row + len(values))
        self._values[rows], self._scales[blocks] = encode.fp8_blocks(values)

    def finish(self) -> None:
        """Quantize blocks some rows of which were never filled."""
        for block, (rows, _) in self._waiting.items():
            self._encode(block * encode.BLOCK, rows)
        self._waiting.clear()

    def warm_up(self, bias: torch.Tensor | None = None) -> None:
        """Compute a product for each tiling."""
        for num_tokens in _compiled(fp8.FIRST_TOKENS):
            self(self._scales.new_zeros(num_tokens, self.num_columns, dtype=self._dtype), bias)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias."""
        x8, x_scale = quantize_fp8(x, encode.BLOCK)
        return fp8_matmul(x8, x_scale, self._values, self._scales, out_dtype=x.dtype, bias=bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids."""
        scales = self._scales[ids // encode.BLOCK].repeat_interleave(encode.BLOCK, 1)
        return (_fp8_rows(self._values, ids) * scales[:, : self.num_columns]).to(self._dtype)

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""
        return self._values.nbytes + self._scales.nbytes


def _compiled(first_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of tokens from which on a product takes another kernel, if kernels are compiled."""
    return first_tokens if mode() == "triton" and not INTERPRETED else ()


def _in_parts(
    first_row: int, values: torch.Tensor, unit: int = 1
) -> Iterator[tuple[int, torch.Tensor]]:
    """Runs of rows, multiples of `unit`, and where they begin, that take little memory."""
    step = max(_NUMBERS_AT_ONCE // max(values.shape[1], 1) // unit, 1) * unit
    for start in range(0, len(values), step):
        yield first_row + start, values[start : start + step]


def _fp8_zeros(num_rows: int, num_columns: int, device: torch.device | str) -> torch.Tensor:
    zeros = torch.zeros(num_rows, num_columns, dtype=torch.uint8, device=device)
    return zeros.view(torch.float8_e4m3fn)


def _fp8_rows(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows as float32; torch picks no 8-bit floating point numbers, but bytes."""
    return values.view(torch.uint8)[ids].view(torch.float8_e4m3fn).float()

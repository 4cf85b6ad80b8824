"""Matrices as the kernels read them: quantized and packed into panels.

Owns the memory of a packed matrix and where its rows lie in it. Knows neither checkpoints nor
what a matrix is for. Invariant: rows that nothing was packed into are zeros.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.native.memory import Arena, Bytes
from penstock.native.pool import Pool
from penstock.native.structs import DTYPES, PackArgs, Weight

PANEL_ROWS = 16


def padded_rows(num_rows: int) -> int:
    """`num_rows` and what fills up the last panel."""
    return -(-num_rows // PANEL_ROWS) * PANEL_ROWS


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of one part lie: panel by panel, `panel_step` apart."""

    first_row: int = 0
    panel_step: int = 1

    def rows(self, num_rows: int) -> NDArray[np.int64]:
        """The row of the packed matrix that holds each row of the part, [num_rows]."""
        source = np.arange(num_rows)
        inside = source % PANEL_ROWS
        return self.first_row + (source - inside) * self.panel_step + inside


class PackedVector:
    """Some float32 numbers, [size], zeros at first."""

    def __init__(self, size: int, arena: Arena) -> None:
        self._size = size
        self._arena = arena
        self._offset = arena.reserve(size * 4)

    @property
    def values(self) -> NDArray[np.float32]:
        """The numbers, to be written and read."""
        end = self._offset + self._size * 4
        return self._arena.memory[self._offset : end].view(np.float32)


class PackedWeight:
    """A matrix [num_rows, num_columns] in the format `dtype`, for the library's ops."""

    def __init__(
        self,
        pool: Pool,
        dtype: str,
        group_size: int,
        num_rows: int,
        num_columns: int,
        arena: Arena,
    ) -> None:
        """Reserve its memory.

        Args:
            dtype: float32, bfloat16, int8 or int4.
            group_size: of int4; else 0.
        """
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._pool = pool
        self._arena = arena
        self._layout = Weight(
            format=DTYPES[dtype], group_size=group_size, num_rows=num_rows, num_columns=num_columns
        )
        pool.library.call("penstock_weight_layout", ctypes.byref(self._layout))
        self._offset = arena.reserve(self._layout.data_bytes)
        is_quantized = dtype in {"int8", "int4"}
        self._scales = PackedVector(padded_rows(num_rows), arena) if is_quantized else None

    @property
    def data(self) -> Bytes:
        """Its panels."""
        return self._arena.memory[self._offset : self._offset + self._layout.data_bytes]

    @property
    def scales(self) -> NDArray[np.float32] | None:
        """Of the rows of a quantized one, the last panel filled up."""
        return None if self._scales is None else self._scales.values

    @property
    def struct(self) -> Weight:
        """As the library takes it. The arena must outlive it."""
        weight = Weight.from_buffer_copy(self._layout)
        weight.data = self.data.ctypes.data
        if self._scales is not None:
            weight.scales = self._scales.values.ctypes.data
        return weight

    def pack(self, source: Bytes, dtype: str, num_rows: int, placement: Placement) -> None:
        """Take in `num_rows` rows of a source, straight from where it is mapped.

        Args:
            source: the bytes of [num_rows, num_columns] numbers, of any alignment.
            dtype: of the source: float32, bfloat16 or float16.

        Raises:
            EngineError: the rows do not fit in there, or one that is to be quantized has NaN or an
                infinity.
        """
        args = PackArgs(
            weight=self.struct,
            source=source.ctypes.data,
            source_dtype=DTYPES[dtype],
            panel_step=placement.panel_step,
            first_row=placement.first_row,
            num_source_rows=num_rows,
        )
        self._pool.library.call("penstock_pack", self._pool.handle, ctypes.byref(args))

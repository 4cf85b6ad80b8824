"""Matrices as the kernels read them: quantized and packed into panels.

Owns the memory of a packed matrix and where its rows lie in it. Knows neither checkpoints nor
what a matrix is for. Invariant: rows that nothing was packed into are zeros.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.errors import EngineError
from penstock.native.memory import Arena, Bytes
from penstock.native.pool import Pool
from penstock.native.structs import DTYPES, Code, PackArgs, PackCodesArgs, Weight

PANEL_ROWS = 16
_CHUNK_BYTES = 4 * 2**20  # of codes that are read at once
_UNIT_COLUMNS = 256
_CODES = {
    "uint8": Code.CODE_UINT8,
    "int8": Code.CODE_INT8,
    "e4m3": Code.CODE_E4M3,
    "e5m2": Code.CODE_E5M2,
}

F32 = NDArray[np.float32]


class CodeForm(Protocol):
    """What this module must know of `quantization.codes.CodeForm`."""

    @property
    def code(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def scales(self) -> str: ...
    @property
    def has_minima(self) -> bool: ...
    @property
    def numbers(self) -> F32: ...


class Form(Protocol):
    """What this module must know of `quantization.schemes.Format`."""

    @property
    def dtype(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def code(self) -> CodeForm | None: ...


class CodeRows(Protocol):
    """What this module must know of `quantization.codes.CodeRows`."""

    @property
    def codes(self) -> NDArray[np.uint8]: ...
    @property
    def scales(self) -> F32: ...
    @property
    def minima(self) -> F32 | None: ...
    @property
    def units(self) -> F32 | None: ...
    @property
    def minimum_units(self) -> F32 | None: ...


class CodedTensor(Protocol):
    """What this module must know of `quantization.codes.CodedTensor`."""

    @property
    def name(self) -> str: ...
    @property
    def form(self) -> CodeForm: ...
    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, first: int, last: int, /) -> CodeRows: ...


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


def weight_of(form: Form, num_rows: int, num_columns: int) -> Weight:
    """What describes a matrix to the library, without its memory and its layout."""
    weight = Weight(
        format=DTYPES[form.dtype],
        group_size=form.group_size,
        num_rows=num_rows,
        num_columns=num_columns,
    )
    if form.code is not None:
        weight.scale_format = DTYPES[form.code.scales]
        weight.has_minima = form.code.has_minima
        if form.dtype == "codes4":
            weight.book[:] = form.code.numbers.tolist()
        else:
            weight.code = _CODES[form.code.code]
    return weight


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
    """A matrix [num_rows, num_columns] in some format, for the library's ops."""

    def __init__(
        self, pool: Pool, form: Form, num_rows: int, num_columns: int, arena: Arena
    ) -> None:
        """Reserve its memory.

        Args:
            form: dtype float32, bfloat16, int8 or int4; codes4 or codes8, with their `code`.

        Raises:
            EngineError: the library has no layout for this.
        """
        self.form = form
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._pool = pool
        self._arena = arena
        self._layout = weight_of(form, num_rows, num_columns)
        pool.library.call("penstock_weight_layout", ctypes.byref(self._layout))
        self._offset = arena.reserve(self._layout.data_bytes)
        has_row_scales = form.dtype in {"int8", "int4"}
        self._scales = PackedVector(padded_rows(num_rows), arena) if has_row_scales else None

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

    def pack_codes(self, tensor: CodedTensor, placement: Placement) -> None:
        """Take in a matrix of codes as it is, some rows at a time.

        Args:
            tensor: [n, num_columns], of the same form as this; or, if this is int8, of int8 codes
                with one float32 scale a row.

        Raises:
            EngineError: it is of another form, its arrays have other shapes than its form says, a
                scale is none of its format's numbers, or the rows do not fit in there.
        """
        self._check_form(tensor)
        num_rows = tensor.shape[0]
        step = max(_CHUNK_BYTES // max(self.num_columns, 1) // PANEL_ROWS, 1) * PANEL_ROWS
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            first_row = placement.first_row + first * placement.panel_step
            rows = tensor.rows(first, last)
            name = f"`{tensor.name}`, rows `{first}` to `{last - 1}`"
            self._pack_rows(name, rows, last - first, Placement(first_row, placement.panel_step))

    def _check_form(self, tensor: CodedTensor) -> None:
        wanted, form = self.form.code, tensor.form
        is_row_int8 = (form.code, form.group_size, form.scales) == ("int8", 0, "float32")
        is_same = wanted is not None and form == wanted
        is_int8 = self.form.dtype == "int8" and is_row_int8 and not form.has_minima
        if not (is_same or is_int8) or tensor.shape[1] != self.num_columns:
            into = wanted or self.form.dtype
            raise EngineError(
                f"`{tensor.name}` has the form `{form}` and `{tensor.shape[1]}` columns; it is "
                f"packed into a matrix of `{into}` and `{self.num_columns}` columns."
            )

    def _pack_rows(self, name: str, rows: CodeRows, num_rows: int, placement: Placement) -> None:
        form = self.form.code
        group_size = form.group_size if form is not None else 0
        groups = (num_rows, -(-self.num_columns // (group_size or self.num_columns)))
        units = (num_rows, -(-self.num_columns // _UNIT_COLUMNS))
        has_minima = form is not None and form.has_minima
        has_units = form is not None and form.scales == "int8"
        wanted = {
            "codes": (np.uint8, (num_rows, self.num_columns)),
            "scales": (np.float32, groups),
            "minima": (np.float32, groups if has_minima else None),
            "units": (np.float32, units if has_units else None),
            "minimum_units": (np.float32, units if has_units and has_minima else None),
        }
        arrays = {}  # alive until the call is over
        for field, (dtype, shape) in wanted.items():
            array = getattr(rows, field)
            if (None if array is None else array.shape) != shape:
                found = None if array is None else array.shape
                raise EngineError(
                    f"{name}: `{field}` of its codes has the shape `{found}`, not `{shape}`."
                )
            if array is not None:
                arrays[field] = np.ascontiguousarray(array, dtype)
        args = PackCodesArgs(
            weight=self.struct,
            first_row=placement.first_row,
            num_source_rows=num_rows,
            panel_step=placement.panel_step,
            **{field: array.ctypes.data for field, array in arrays.items()},
        )
        try:
            self._pool.library.call("penstock_pack_codes", self._pool.handle, ctypes.byref(args))
        except EngineError as error:
            raise EngineError(f"{name}: {error.message}") from error

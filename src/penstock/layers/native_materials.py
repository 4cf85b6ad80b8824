"""What the native leaves are made of: a program, memory for weights, and how a checkpoint fills it.

Owns the way of a stored tensor into its place: packed as the matrix's format says, or converted
into a vector. Knows neither files nor models, and imports no torch.

Invariant: a stored matrix is packed once, straight from the mapped file; codes stay as they are
where the matrix has their form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import EngineError, ModelLoadError
from penstock.layers.specs import RopeSpec
from penstock.layers.toolkit import RowMap, Stored, StoredTensor, Weight
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.program import Buffer, Program
from penstock.native.weights import PANEL_ROWS, PackedVector, PackedWeight, Placement
from penstock.quantization.codes import CodedTensor, CodeForm
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import Format

F32 = NDArray[np.float32]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROWS_AT_ONCE = 64 * PANEL_ROWS  # of a coded matrix, where its numbers are made on the way
_PLACED = Placement()


class Matrix(NamedTuple):
    """A packed matrix, and what its numbers are."""

    form: Format
    packed: PackedWeight
    is_coded: bool  # the checkpoint has codes, and they are taken as they are

    @property
    def num_rows(self) -> int:
        """Of all its parts, with what lies between them."""
        return self.packed.num_rows

    @property
    def num_columns(self) -> int:
        """Numbers of a row."""
        return self.packed.num_columns


@dataclass(frozen=True, slots=True)
class NativeMaterials:
    """What the leaves of one model are made of."""

    program: Program
    arena: Arena  # of the weights
    dtype: str  # of activations: float32 or bfloat16
    formats: Formats
    kv: KVMemory
    angles: dict[RopeSpec, Buffer] = field(default_factory=dict)  # recorded so far

    def matrix(self, form: Format, num_rows: int, num_columns: int) -> Matrix:
        """Memory for a matrix."""
        packed = PackedWeight(self.program.pool, form, num_rows, num_columns, self.arena)
        is_coded = form.code is not None or (
            form.dtype == "int8" and self.formats.stored is not None
        )
        return Matrix(form, packed, is_coded)

    def vector(self, size: int) -> PackedVector:
        """Memory for float32 numbers, zeros at first."""
        return PackedVector(size, self.arena)

    def value(self, width: int) -> Buffer:
        """A value between ops, in the model's format."""
        return self.program.value(width, self.dtype)

    def bits_beside(self, *forms: Format) -> int:
        """What ops multiply matrices of these formats with: see `penstock_linear_args`."""
        is_integer = any(form.dtype in {"int8", "int4"} for form in forms)
        return self.formats.activation_bits if is_integer else 16


def matrix_weight(
    name: str,
    matrix: Matrix,
    num_rows: int,
    placement: Placement = _PLACED,
    rows: RowMap | None = None,
    duplicate_of: str | None = None,
) -> Weight:
    """A weight [num_rows, columns of the matrix] that is packed into some rows of it."""
    load = partial(pack, matrix, placement)
    return Weight(name, (num_rows, matrix.num_columns), load, duplicate_of, rows)


def vector_weight(
    name: str,
    values: F32,
    size: int,
    placement: Placement = _PLACED,
    rows: RowMap | None = None,
) -> Weight:
    """A weight [size] that goes to some places of `values`."""
    return Weight(name, (size,), partial(_fill, values, placement), rows=rows)


def pack(matrix: Matrix, placement: Placement, stored: Stored) -> None:
    """Take in a stored matrix.

    Raises:
        ModelLoadError: it cannot be quantized, or it is in another form than was to be expected.
    """
    try:
        if isinstance(stored, CodedTensor):
            _pack_codes(matrix, placement, stored)
        elif matrix.is_coded:
            raise _unexpected(stored.name, "plain numbers")
        else:
            matrix.packed.pack(stored.data, _DTYPES[stored.dtype], stored.shape[0], placement)
    except EngineError as error:
        raise ModelLoadError(f"`{stored.name}` cannot be packed: {error.message}") from error


def _pack_codes(matrix: Matrix, placement: Placement, stored: CodedTensor) -> None:
    """As codes if the matrix has their form, else as the numbers that they stand for."""
    form = matrix.form
    if stored.form == form.code or (form.dtype == "int8" and stored.form == CodeForm("int8", 0)):
        matrix.packed.pack_codes(stored, placement)
        return
    if matrix.is_coded:
        raise _unexpected(stored.name, f"codes of the form `{stored.form}`")
    for first in range(0, stored.shape[0], _ROWS_AT_ONCE):
        values = stored.values(first, min(first + _ROWS_AT_ONCE, stored.shape[0]))
        place = Placement(placement.first_row + first * placement.panel_step, placement.panel_step)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        matrix.packed.pack(data, "float32", len(values), place)


def _unexpected(name: str, found: str) -> ModelLoadError:
    return ModelLoadError(
        f"`{name}` is stored as {found}, which is not what the checkpoint's config says of it.",
        hint="config.json and the weights must come from the same checkpoint.",
    )


def numbers(stored: Stored) -> F32:
    """A stored tensor as float32, in its shape."""
    if isinstance(stored, CodedTensor):
        return stored.values()
    raw = stored.data.tobytes()  # which need not have been aligned
    match stored.dtype:
        case "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F16":
            values = np.frombuffer(raw, np.float16).astype(np.float32)
        case _:
            values = np.frombuffer(raw, np.float32)
    return values.reshape(stored.shape)


def _fill(vector: F32, placement: Placement, stored: Stored) -> None:
    """Convert a stored vector into its places in `vector`."""
    assert isinstance(stored, StoredTensor), "a vector has no codes"
    values = numbers(stored)
    vector[placement.rows(len(values))] = values

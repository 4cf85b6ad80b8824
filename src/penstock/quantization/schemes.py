"""What `--quantization` means: the number format of every matrix, and of what it multiplies.

Owns the names and the arithmetic of packed bytes. Quantizing and packing is done by the native
library when a checkpoint is loaded. Imports neither torch nor the library.
Invariant: `packed_bytes` is what the library takes (`tests/quantization/test_schemes.py`).
"""

from __future__ import annotations

from typing import NamedTuple

_PANEL_ROWS = 16
_COLUMNS = 64  # what columns are padded to
_ALIGNMENT = 64
_SCALE_BYTES = 4
_INT4_BYTES = 512 + 16  # of 64 columns of a panel: values, then scales of groups


class Format(NamedTuple):
    """How a matrix is stored.

    int8: a scale for each row. int4: a scale for each row and an integer factor of it, 0 to 15,
    for each group of columns, so that every weight is exactly an int8 one (QServe, Lin et al.
    2024).
    """

    dtype: str  # float32, bfloat16, int8, int4
    group_size: int = 0  # columns in a group of int4: 32 or 128


class Scheme(NamedTuple):
    """The formats of one model. Activations are in the model's dtype between the operations."""

    linear: Format  # of the matrices in its blocks
    table: Format  # of the embedding and the head
    activation_bits: int  # what quantized matrices multiply: int8, a scale a token; 16: bfloat16


_INT8 = Format("int8")
_INT4 = Format("int4", 32)
_INT4_G128 = Format("int4", 128)

_SCHEMES = {
    "int8": Scheme(_INT8, _INT8, 8),
    "int8-a16": Scheme(_INT8, _INT8, 16),
    "int4": Scheme(_INT4, _INT4, 8),
    "int4-a16": Scheme(_INT4, _INT4, 16),
    "int4-g128": Scheme(_INT4_G128, _INT8, 8),
    "int4-g128-a16": Scheme(_INT4_G128, _INT8, 16),
}
NONE = "none"
NAMES = (NONE, *_SCHEMES)


def scheme(name: str, dtype: str) -> Scheme:
    """The scheme of that name, for a model that computes in `dtype` (float32 or bfloat16)."""
    return Scheme(Format(dtype), Format(dtype), 16) if name == NONE else _SCHEMES[name]


def packed_bytes(form: Format, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix [num_rows, num_columns] as the native library packs it."""
    unit = form.group_size if form.dtype == "int4" and form.group_size > _COLUMNS else _COLUMNS
    columns = _up(num_columns, unit)
    rows = _up(num_rows, _PANEL_ROWS)
    if form.dtype == "int4":
        panel_bytes = columns // _COLUMNS * _INT4_BYTES
    else:
        panel_bytes = columns * _PANEL_ROWS * {"float32": 4, "bfloat16": 2, "int8": 1}[form.dtype]
    scale_bytes = rows * _SCALE_BYTES if form.dtype in {"int8", "int4"} else 0
    return rows // _PANEL_ROWS * _up(panel_bytes, _ALIGNMENT) + scale_bytes


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

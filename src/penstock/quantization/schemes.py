"""What `--quantization` means: the number format of every matrix, and of what it multiplies.

Owns the names and the arithmetic of bytes. Quantizing and packing is done by the native library
or by `quantization.device` when a checkpoint is loaded. Imports neither torch nor the library.
Invariant: `packed_bytes` is what the library takes (`tests/quantization/test_schemes.py`), and
`device_bytes` what the tensors on a GPU take (`tests/quantization/test_device.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from penstock.quantization.forms import UNIT_COLUMNS, CodeForm

_PANEL_ROWS = 16
_COLUMNS = 64  # what columns are padded to
_ALIGNMENT = 64
_SCALE_BYTES = 4
_INT4_BYTES = 512 + 16  # of 64 columns of a panel: values, then scales of groups
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
DEVICE_COLUMNS = 128  # what the columns of integer formats are padded to on a GPU


class Format(NamedTuple):
    """How a matrix is stored.

    int8: a scale for each row. int4: a scale for each row and an integer factor of it, 0 to 15,
    for each group of columns, so that every weight is exactly an int8 one (QServe, Lin et al.
    2024). fp8: float8_e4m3fn, a scale for each row, or for each square block of a group's size
    (DeepSeek-V3, 2024). codes4, codes8: as a quantized checkpoint has it, which `code` says.
    """

    dtype: str  # float32, bfloat16, float16, int8, int4, fp8, codes4, codes8
    group_size: int = 0  # columns in a group: 32 or 128 of int4, 0 or 128 of fp8, as `code` says
    code: CodeForm | None = None


def coded(form: CodeForm, activation_bits: int = 16) -> Format:
    """How a backend stores what a checkpoint has in such codes.

    Whole rows of int8 with activations of 8 bits are what `int8` is.
    """
    if activation_bits == 8 and form == CodeForm("int8", 0):
        return Format("int8")
    return Format(f"codes{form.bits}", form.group_size, form)


class Scheme(NamedTuple):
    """The formats of one model. Activations are in the model's dtype between the operations."""

    linear: Format  # of the matrices in its blocks
    table: Format  # of the embedding and the head
    # What quantized matrices multiply. 8: int8 or fp8, a scale a token (blocks of fp8: a scale a
    # token and group); 16: the model's own type.
    activation_bits: int


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
_FP8_GROUPS = {"fp8": 0, "fp8-block": 128}  # their tables stay in the model's dtype
NONE = "none"
NATIVE_NAMES = (NONE, *_SCHEMES)
DEVICE_NAMES = (NONE, *(name for name in _SCHEMES if name.endswith("-a16")), *_FP8_GROUPS)
NAMES = (*NATIVE_NAMES, *_FP8_GROUPS)


def scheme(name: str, dtype: str) -> Scheme:
    """The scheme of that name, for a model that computes in `dtype`."""
    if name in _FP8_GROUPS:
        return Scheme(Format("fp8", _FP8_GROUPS[name]), Format(dtype), 8)
    return Scheme(Format(dtype), Format(dtype), 16) if name == NONE else _SCHEMES[name]


def packed_bytes(form: Format, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix [num_rows, num_columns] as the native library packs it."""
    if form.code is not None:
        return _coded_bytes(form.code, num_rows, num_columns)
    unit = form.group_size if form.dtype == "int4" and form.group_size > _COLUMNS else _COLUMNS
    columns = _up(num_columns, unit)
    rows = _up(num_rows, _PANEL_ROWS)
    if form.dtype == "int4":
        panel_bytes = columns // _COLUMNS * _INT4_BYTES
    else:
        panel_bytes = columns * _PANEL_ROWS * _ITEM_BYTES[form.dtype]
    scale_bytes = rows * _SCALE_BYTES if form.dtype in {"int8", "int4"} else 0
    return rows // _PANEL_ROWS * _up(panel_bytes, _ALIGNMENT) + scale_bytes


def _coded_bytes(form: CodeForm, num_rows: int, num_columns: int) -> int:
    """The same of codes: of every panel the codes, and the scales and minima of each group."""
    columns = _up(num_columns, _COLUMNS)
    group_size = columns
    if 0 < form.group_size < columns:
        group_size = form.group_size
        columns = _up(columns, math.lcm(_COLUMNS, group_size))
    scale_bytes = columns // group_size * _ITEM_BYTES[form.scales]
    if form.scales == "int8":
        scale_bytes += -(-columns // UNIT_COLUMNS) * _SCALE_BYTES
    row_bytes = columns * form.bits // 8 + scale_bytes * (2 if form.has_minima else 1)
    return -(-num_rows // _PANEL_ROWS) * _up(row_bytes * _PANEL_ROWS, _ALIGNMENT)


def device_bytes(form: Format, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix [num_rows, num_columns] on a GPU, as `quantization.device` lays it out."""
    padded = _up(num_columns, DEVICE_COLUMNS)
    match form.dtype:
        case "int4":  # two to a byte, and a byte for every 32: the factor of their group
            return num_rows * (padded // 2 + padded // 32 + _SCALE_BYTES)
        case "int8":
            return num_rows * (padded + _SCALE_BYTES)
        case "fp8":
            size = form.group_size
            num_blocks = _up(num_rows, size) * _up(num_columns, size) // size**2 if size else 0
            return num_rows * num_columns + (num_blocks or num_rows) * _SCALE_BYTES
        case dtype:
            return num_rows * num_columns * _ITEM_BYTES[dtype]


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

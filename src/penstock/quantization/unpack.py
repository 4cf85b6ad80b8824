"""Reads packed matrices back, in numpy alone: the oracle of tests and of quality measurements.

Follows `penstock_native.h` and the layout in `csrc/src/pack.cpp`; shares no code with them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.quantization.schemes import Format

F32 = NDArray[np.float32]


def unpack(
    form: Format, data: NDArray[np.uint8], scales: F32 | None, num_rows: int, num_columns: int
) -> F32:
    """The numbers that a packed matrix stands for, [num_rows, num_columns].

    Args:
        data: all its panels.
        scales: [num_rows, padded to panels]; of int8 and int4.
    """
    panels = data.reshape(-(-num_rows // 16), -1)
    match form.dtype:
        case "float32":
            values = _rows(panels.view(np.float32), 1)
        case "bfloat16":
            values = _rows((panels.view(np.uint16).astype(np.uint32) << 16).view(np.float32), 2)
        case "int8":
            values = _rows(panels.astype(np.float32) - 128, 4)
        case _:
            columns = panels.shape[1] * 64 // (512 + 16) // 64 * 64
            values = _int4_rows(panels, columns)
    if scales is not None:
        values = values * scales[: len(values), None]
    return np.ascontiguousarray(values[:num_rows, :num_columns], np.float32)


def _rows(panels: F32, together: int) -> F32:
    """[panel, k / together, 16, together] to [row, k]."""
    num_panels = len(panels)
    values = panels.reshape(num_panels, -1, 16, together).transpose(0, 2, 1, 3)
    return values.reshape(num_panels * 16, -1)


def _int4_rows(panels: NDArray[np.uint8], columns: int) -> F32:
    """Integers times the factors of their groups, [row, columns]."""
    num_panels, num_blocks = len(panels), columns // 64
    nibbles = panels[:, : num_blocks * 512].reshape(num_panels, num_blocks, 8, 16, 4)
    halves = np.stack([nibbles & 15, nibbles >> 4]).astype(np.float32) - 8
    # [half, panel, block, vector, row, byte] to [panel, row, block, half, vector, byte]
    values = halves.transpose(1, 4, 2, 0, 3, 5).reshape(num_panels, 16, num_blocks, 2, 32)
    ends = num_blocks * (512 + 16)
    factors = panels[:, num_blocks * 512 : ends].reshape(num_panels, num_blocks, 16)
    both = np.stack([factors & 15, factors >> 4]).astype(np.float32)
    values = values * both.transpose(1, 3, 2, 0)[..., None]
    return values.reshape(num_panels * 16, columns)

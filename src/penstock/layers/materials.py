"""What the torch leaves are made of: memory for parameters, and the bytes of a checkpoint in it.

Owns the number format and the device of a model's parameters. Knows neither files nor models.

Invariant: a stored tensor is converted once, straight from the mapped file into its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from penstock.layers.toolkit import RowMap, Stored, Weight
from penstock.quantization.codes import CodedTensor

_ROWS_AT_ONCE = 1024  # of a coded matrix, whose numbers are made on the way
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Materials:
    """What the layers of one model are made of."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for a parameter."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def weight(
    name: str,
    data: torch.Tensor,
    duplicate_of: str | None = None,
    rows: RowMap | None = None,
) -> Weight:
    """A weight that is loaded into `data`, often a view of a larger tensor."""
    return Weight(name, tuple(data.shape), partial(_fill, data), duplicate_of, rows)


def _fill(data: torch.Tensor, stored: Stored) -> None:
    """Convert a stored tensor into `data`."""
    if isinstance(stored, CodedTensor):
        for first in range(0, stored.shape[0], _ROWS_AT_ONCE):
            values = torch.from_numpy(stored.values(first, min(first + _ROWS_AT_ONCE, len(data))))
            data[first : first + len(values)].copy_(values)
        return
    dtype = _DTYPES[stored.dtype]
    raw = stored.data
    if raw.ctypes.data % dtype.itemsize:  # the format does not promise that numbers are aligned
        raw = raw.copy()
    data.copy_(torch.from_numpy(raw).view(dtype).view(stored.shape))

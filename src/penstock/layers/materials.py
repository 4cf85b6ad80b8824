"""What the torch leaves are made of: memory for parameters, and the bytes of a checkpoint in it.

Owns the number format and the device of a model's parameters. Knows neither files nor models.

Invariant: a stored tensor is converted once, straight from the mapped file into its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from penstock.layers.toolkit import StoredTensor, Weight

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Materials:
    """What the layers of one model are made of."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for a parameter."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def weight(name: str, data: torch.Tensor, duplicate_of: str | None = None) -> Weight:
    """A weight that is loaded into `data`, often a view of a larger tensor."""
    return Weight(name, tuple(data.shape), partial(_fill, data), duplicate_of)


def _fill(data: torch.Tensor, stored: StoredTensor) -> None:
    """Convert a stored tensor into `data`."""
    dtype = _DTYPES[stored.dtype]
    raw = stored.data
    if raw.ctypes.data % dtype.itemsize:  # the format does not promise that numbers are aligned
        raw = raw.copy()
    data.copy_(torch.from_numpy(raw).view(dtype).view(stored.shape))

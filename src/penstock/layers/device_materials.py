"""What leaves on a device are made of: memory for their numbers, and how tensors get there.

Owns `DeviceMaterials` and `Taken`. Knows neither files nor what a leaf computes; how a matrix is
stored is `quantization.device`'s business, which part of it a rank has is `layers.shards`'.

Invariant: a stored tensor goes straight from the mapped file into its place on the device; one that
is stored as codes becomes numbers a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.errors import EngineError, ModelLoadError
from penstock.layers.toolkit import Stored
from penstock.parallel.group import Group
from penstock.quantization.codes import CodedTensor
from penstock.quantization.device import DeviceWeight, make_weight
from penstock.quantization.schemes import Format, Scheme

# Gets rows of a rank's share, on the device, and which of the share's rows the first of them is.
Keep = Callable[[int, torch.Tensor], object]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODED_AT_ONCE = 2**22  # numbers of a coded matrix: some 20 bytes each on the host


@dataclass(frozen=True, slots=True)
class DeviceMaterials:
    """What the leaves of one rank's model are made of."""

    dtype: torch.dtype  # of activations, and of weights without quantization
    device: torch.device
    group: Group
    scheme: Scheme

    def matrix(self, form: Format, num_rows: int, num_columns: int) -> DeviceWeight:
        """Memory for a matrix of zeros."""
        return make_weight(form, num_rows, num_columns, self.dtype, self.device)

    def vector(self, size: int, value: float, *, is_wide: bool = False) -> torch.Tensor:
        """Memory for a bias or for the scale of a norm; wide: in float32."""
        dtype = torch.float32 if is_wide else self.dtype
        return torch.full((size,), value, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Taken:
    """Takes in a whole tensor of a checkpoint and keeps this rank's share of it."""

    share: tuple[slice, ...]
    keep: Keep
    device: torch.device

    def __call__(self, stored: Stored) -> None:
        """What `Weight.load` is."""
        if isinstance(stored, CodedTensor):
            self._decode(stored)
            return
        dtype = _DTYPES[stored.dtype]
        raw = stored.data
        if raw.ctypes.data % dtype.itemsize:  # the format does not promise that numbers are aligned
            raw = raw.copy()
        self.take(stored.name, torch.from_numpy(raw).view(dtype).view(stored.shape))

    def take(self, name: str, values: torch.Tensor) -> None:
        """Keep the share of `values`, the whole tensor on any device."""
        self._put(name, 0, values[self.share])

    def _decode(self, stored: CodedTensor) -> None:
        """Keep the share of a matrix of codes, some rows at a time."""
        rows, *columns = self.share
        first, last, _ = rows.indices(stored.shape[0])
        step = max(_DECODED_AT_ONCE // max(stored.shape[1], 1), 1)
        for start in range(first, last, step):
            values = torch.from_numpy(stored.values(start, min(start + step, last)))
            self._put(stored.name, start - first, values[(slice(None), *columns)])

    def _put(self, name: str, start: int, share: torch.Tensor) -> None:
        try:
            self.keep(start, share.to(self.device))
        except EngineError as error:
            raise ModelLoadError(f"`{name}` cannot be quantized: {error.message}") from error


def put(target: torch.Tensor, start: int, values: torch.Tensor) -> None:
    """A `Keep` of a tensor that holds its rows as they are."""
    target[start : start + len(values)].copy_(values)


def fill(matrix: DeviceWeight, first_row: int, start: int, values: torch.Tensor) -> None:
    """A `Keep` of the rows of a matrix from `first_row` on."""
    matrix.fill(first_row + start, values)

"""Numbers on their way between the host and a device, without anyone waiting for them.

Owns the host memory that copies run from and to. Beside a GPU it is pinned, from torch's caching
allocator, which gives a piece out again only when the copies that used it are done: a piece is
therefore made for one step and dropped, and nothing here is used twice (the lesson of vLLM's second
runner). On a CPU the same calls copy at once.

Invariant: only `Event.synchronize` waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 4  # int32 numbers: kernels compiled for 16-byte addresses serve every step


class Event(Protocol):
    """A point in the work of a device."""

    def record(self) -> None:
        """It is behind all work that was given to the device so far."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""


class _Passed:
    """Implements `Event` where all work is done at once."""

    def record(self) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def event(device: torch.device) -> Event:
    """An event of that device."""
    return torch.cuda.Event() if device.type == "cuda" else _Passed()


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where `upload` puts arrays of so many int32 numbers, and how many numbers that takes."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += size + -size % ALIGNMENT
    return starts, end


def upload(
    arrays: Sequence[NDArray[Any]], device: torch.device, into: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """One copy of all arrays to the device; what they are there, in the same order.

    Args:
        arrays: 1-D, int32 or int64.
        into: int32 [at least what they take by `places`], on the device: they are put there. None:
            into new memory.
    """
    sizes = [len(array) * (array.itemsize // 4) for array in arrays]
    starts, num_numbers = places(sizes)
    host = torch.empty(num_numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    numbers = host.numpy()
    for array, start, size in zip(arrays, starts, sizes, strict=True):
        numbers[start : start + size] = array.view(np.int32)
    if into is None:
        there = host.to(device, non_blocking=True)
    else:
        there = into[:num_numbers]
        there.copy_(host, non_blocking=True)
    found = []
    for array, start, size in zip(arrays, starts, sizes, strict=True):
        piece = there[start : start + size]
        found.append(piece.view(torch.int64) if array.itemsize == 8 else piece)
    return found


def download(x: torch.Tensor) -> torch.Tensor:
    """Where x will be on the host, once an event recorded after this call has come."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True)

"""Memory for weights, activations and the KV cache.

Owns how it is asked from the system: zeros that become real when they are touched, in huge pages
where the system has them. Invariant: what is handed out begins at a multiple of `ALIGNMENT`.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64  # a cache line, and the widest vector
HUGE_PAGE_BYTES = 2 * 2**20

Bytes = NDArray[np.uint8]


def allocate(num_bytes: int, *, huge_pages: bool = True) -> Bytes:
    """Zeros, [num_bytes]. They live as long as a view of them does."""
    if num_bytes < HUGE_PAGE_BYTES:
        memory = np.zeros(num_bytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=flags)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them: slower, not wrong
                mapped.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(mapped, np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[start : start + num_bytes]


class Arena:
    """One piece of memory for many things, whose places are all known before any byte is touched.

    Invariant: what is reserved in the same order and sizes lies at the same offsets, so that the
    memory of one process can be another's.
    """

    def __init__(self) -> None:
        self.reserved: list[int] = []  # bytes, by place
        self.num_bytes = 0
        self._memory: Bytes | None = None

    def reserve(self, num_bytes: int) -> int:
        """Room for so many bytes, at the offset that is returned. Before `memory` is asked for."""
        assert self._memory is None, "an arena does not grow once its memory is in use"
        offset = self.num_bytes
        self.reserved.append(num_bytes)
        self.num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return offset

    @property
    def memory(self) -> Bytes:
        """All of it, [num_bytes]: zeros at first."""
        if self._memory is None:
            self._memory = allocate(self.num_bytes)
        return self._memory

"""Whether the files of a model are in the page cache: read from memory, or from the disk.

Knows Linux; elsewhere nothing is known and nothing done.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = mmap.PAGESIZE


def files_of(model: str) -> list[Path]:
    """The files that a model is: one, or those of a directory."""
    path = Path(model).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def resident_share(files: Iterable[Path]) -> float | None:
    """Which share of the files' pages is in memory (mincore); None: not known."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    num_pages = num_resident = 0
    for file in files:
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                if size == 0:
                    continue
                # A private mapping may be written, so that its address can be had; nobody does.
                with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as data:
                    count = -(-size // PAGE)
                    found = (ctypes.c_ubyte * count)()
                    start = ctypes.c_char.from_buffer(data)
                    address = ctypes.c_void_p(ctypes.addressof(start))
                    failed = libc.mincore(address, ctypes.c_size_t(size), found)
                    del start  # the mapping cannot be closed while it is pointed to
                    if failed:
                        return None
        except OSError:
            return None
        num_pages += count
        num_resident += sum(byte & 1 for byte in found)
    return num_resident / num_pages if num_pages else None


def evict(files: Iterable[Path]) -> None:
    """Ask the kernel to drop the files from memory, as far as no process uses them."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # what is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

"""The threads that run programs.

Owns a pool of the library and how many threads it has. Invariant: a pool ends with its last user,
and not before: at the end of the interpreter another thread may still run a program on it.
"""

from __future__ import annotations

import ctypes
import os
import weakref

from penstock.hardware import num_usable_cores
from penstock.native.library import Library


class Pool:
    """Threads that wait for work; whoever runs a program is one of them.

    A pool that takes all CPUs of the process has each of its workers pinned to one, so that the
    system does not move them; a smaller one is left to the system, because another process may
    have pinned the same CPUs.
    """

    def __init__(self, library: Library, num_threads: int | None = None) -> None:
        """Start the threads; by default one for each usable CPU.

        Raises:
            EngineError: the system gives no such threads.
        """
        self.library = library
        self.num_threads = num_threads or num_usable_cores()
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cpus = None
        if self.num_threads == len(usable):
            cpus = (ctypes.c_int32 * len(usable))(*usable)
        self.handle: int = library.call("penstock_pool_create", self.num_threads, cpus)
        destroy = library.function("penstock_pool_destroy")
        weakref.finalize(self, destroy, self.handle).atexit = False

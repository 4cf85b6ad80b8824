"""The library in its process: what is missing from it, and how the process ends."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.native import library as native
from penstock.native import pool as pools
from penstock.native.library import Library
from penstock.native.pool import Pool
from penstock.native.structs import ABI_VERSION

BUSY_AT_EXIT = """
import threading, time
import numpy as np
from penstock.native import library
from penstock.native.pool import Pool
from penstock.native.sampling import Sampler

choose = Sampler(Pool(library.load(), 2))
logits = np.random.default_rng(0).standard_normal((16, 60_000), np.float32)
ones = np.ones(16, np.float32)
begun = threading.Event()

def work():
    while True:
        begun.set()
        choose(logits, ones, np.zeros(16, np.int32), 0.9 * ones, 0 * ones, np.full(16, 0.5))

threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(0.1)
"""


def test_the_interpreter_may_end_while_a_thread_uses_a_pool(library: Library) -> None:
    for _ in range(4):  # when it went wrong, it did so every other time
        done = subprocess.run([sys.executable, "-c", BUSY_AT_EXIT], check=False, timeout=60)
        assert done.returncode == 0


def test_a_pool_ends_with_its_last_user(library: Library) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads cannot be counted here")
    before = len(os.listdir("/proc/self/task"))
    pool = Pool(library, 3)
    assert len(os.listdir("/proc/self/task")) == before + 2
    del pool
    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.parametrize("num_cores", [1, 2])
def test_a_quota_below_the_affinity_pins_nothing(
    library: Library, monkeypatch: pytest.MonkeyPatch, num_cores: int
) -> None:
    """As in a container: many CPUs to run on, and the time of fewer."""
    pinned: list[object] = []
    really = library.call

    def call(name: str, *arguments: object) -> object:
        pinned.append(arguments[1])
        return really(name, arguments[0], None)

    monkeypatch.setattr(pools, "num_usable_cores", lambda: num_cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 3, 8}, raising=False)
    monkeypatch.setattr(library, "call", call)
    assert Pool(library).num_threads == num_cores
    assert pinned == [None]
    Pool(library, 3)
    assert isinstance(pinned[1], ctypes.Array)
    assert list(pinned[1]) == [3, 5, 8]


def test_an_incomplete_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    incomplete = SimpleNamespace(penstock_abi_version=lambda: ABI_VERSION)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: incomplete)
    with pytest.raises(ValueError, match=r"`.*old\.so` lacks `penstock_"):
        Library(tmp_path / "old.so")


def test_a_library_that_cannot_be_used_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PENSTOCK_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    find = native._find.__wrapped__
    assert "has no native library" in str(find())
    (tmp_path / native.FILE_NAME).write_text("no library")
    assert "cannot be loaded" in str(find())

"""Memory and CPU time of process trees: files that we wrote, and processes that really run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.measure.meters import memory

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TOUCH = "b = bytearray(64 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\n"
WAIT = "print('ready', flush=True)\nimport sys; sys.stdin.read()\n"
PARENT = f"""
import subprocess, sys
code = {TOUCH + WAIT!r}
for _ in range(2):
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
"""


def put_process(
    proc: Path,
    pid: int,
    *,
    children: dict[int, list[int]] | None = None,
    pages: int = 0,
    ticks: tuple[int, int, int, int] = (0, 0, 0, 0),
    threads: int = 1,
    hwm_kib: int = 0,
    pss_kib: int | None = None,
    state: str = "S",
) -> None:
    """A process as Linux shows it; `children` by thread."""
    directory = proc / str(pid)
    for thread, found in (children or {pid: []}).items():
        (directory / "task" / str(thread)).mkdir(parents=True, exist_ok=True)
        text = " ".join(map(str, found)) + " "
        (directory / "task" / str(thread) / "children").write_text(text)
    times = " ".join(map(str, ticks))
    before = " ".join(["0"] * 10)
    (directory / "stat").write_text(f"{pid} (a) b (c) {state} {before} {times} 20 0 {threads} 0 99")
    (directory / "statm").write_text(f"9999 {pages} 1 1 0 1 0\n")
    (directory / "status").write_text(f"Name:\tx\nVmPeak:\t 9 kB\nVmHWM:\t {hwm_kib} kB\n")
    if pss_kib is not None:
        text = f"0-1 ---p 0 00:00 0 [rollup]\nRss: 5 kB\nPss: {pss_kib} kB\nPss_Anon: 1 kB\n"
        (directory / "smaps_rollup").write_text(text)


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that has said that it is ready; its descendants end with its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=20)
        process.stdout.close()


def test_a_tree_is_summed_over_children_of_every_thread(tmp_path: Path) -> None:
    put_process(
        tmp_path,
        10,
        children={10: [20], 11: [30]},
        pages=100,
        ticks=(TICKS, TICKS, 2 * TICKS, 0),
        threads=2,
        hwm_kib=100 * PAGE // 1024 + 1000,
        pss_kib=7,
    )
    put_process(tmp_path, 20, children={20: [40]}, pages=200, threads=3, pss_kib=8)
    put_process(tmp_path, 30, pages=300, ticks=(0, TICKS // 2, 0, 0), pss_kib=9)
    put_process(tmp_path, 40, pages=50, ticks=(TICKS, 0, 0, 0), state="Z")
    put_process(tmp_path, 99, pages=10**6)
    found = memory.Tree(10, tmp_path).read(with_pss=True)
    assert found is not None
    assert sorted(found.pids) == [10, 20, 30], "the zombie has no memory, 99 is no descendant"
    assert found.rss_bytes == 600 * PAGE
    assert found.pss_bytes == 24 * 1024
    assert found.cpu_s == pytest.approx(5.5), "with those that have ended, waited for or not"
    assert found.num_threads == 6
    # A high-water mark may lag behind; the sum is never below what is resident.
    assert found.hwm_bytes == 600 * PAGE + 1000 * 1024


def test_what_is_not_readable_is_not_told(tmp_path: Path) -> None:
    put_process(tmp_path, 10, children={10: [20]}, pages=1, pss_kib=4)
    put_process(tmp_path, 20, pages=1)  # of another user
    found = memory.Tree(10, tmp_path).read(with_pss=True)
    assert found is not None
    assert found.pss_bytes is None, "a sum that lacks a part is none"
    assert memory.Tree(11, tmp_path).read() is None


def test_what_takes_long_is_done_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]

    def slow_tree(pid: int, proc: Path) -> list[int]:
        now_s[0] += 0.05  # as with thousands of threads
        looked.append(now_s[0])
        return [pid]

    looked: list[float] = []
    monkeypatch.setattr(memory.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(memory, "tree", slow_tree)
    put_process(tmp_path, 10, pages=1, pss_kib=4)
    one, with_pss = memory.Tree(10, tmp_path), []
    for _ in range(30):
        found = one.read()
        assert found is not None
        with_pss.append(found.pss_bytes is not None)
        now_s[0] += 1.0
    assert len(looked) == 3, "50 ms are half a percent of 10 s"
    assert [index for index, told in enumerate(with_pss) if told] == [0, 10, 20]


def test_the_machine_is_not_busy_with_what_was_stolen_from_it(tmp_path: Path) -> None:
    cpu = [100, 10, 50, 9999, 999, 5, 15, 700, 80, 0]  # user ... softirq, steal, guest
    (tmp_path / "stat").write_text("cpu  " + " ".join(map(str, cpu)) + "\ncpu0 1 1\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\n")
    found = memory.machine_usage(tmp_path)
    assert found is not None
    assert found.busy_cpu_s == pytest.approx(180 / TICKS)
    assert (found.used_bytes, found.total_bytes) == (400 * 1024, 1000 * 1024)
    assert memory.machine_usage(tmp_path / "nowhere") is None


@linux
def test_children_count_and_the_parent_alone_does_not_show_them() -> None:
    with running(PARENT + WAIT) as process:
        found = memory.Tree(process.pid).read(with_pss=True)
        assert found is not None
        assert len(found.pids) == 3
        alone = memory.TreeUsage(hwm_bytes=0)
        memory._add(alone, process.pid, memory.PROC, False)
        assert alone.rss_bytes < 64 * MIB
        assert 128 * MIB < found.rss_bytes < 128 * MIB + 3 * 40 * MIB
        assert found.pss_bytes is not None
        assert 128 * MIB < found.pss_bytes < found.rss_bytes
        assert found.hwm_bytes is not None
        assert found.hwm_bytes >= found.rss_bytes
        other = memory._tree_usage_psutil(process.pid)
        assert other is not None
        assert sorted(other.pids) == sorted(found.pids)
        assert other.rss_bytes == pytest.approx(found.rss_bytes, rel=0.05)
        assert other.num_threads == found.num_threads
    assert memory.Tree(process.pid).read() is None
    assert memory._tree_usage_psutil(process.pid) is None


@linux
def test_a_peak_between_two_readings_is_in_the_high_water_mark() -> None:
    with running(TOUCH + "del b\n" + WAIT) as process:
        found = memory.Tree(process.pid).read()
        assert found is not None
        assert found.hwm_bytes is not None
        assert found.rss_bytes < 64 * MIB < found.hwm_bytes


@linux
def test_time_of_a_child_that_has_ended_is_kept() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n"
    with running(parent + WAIT) as process:
        found = memory.tree_usage(process.pid)
        assert found is not None
        assert len(found.pids) == 1
        assert found.cpu_s >= 0.25


def test_who_listens_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert memory.listening_pid(port) == os.getpid()
        assert memory.listening_pid(port, "localhost") == os.getpid()
        assert memory.listening_pid(port, "192.0.2.1") is None
    assert memory.listening_pid(port) is None

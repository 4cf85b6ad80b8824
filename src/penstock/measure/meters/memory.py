"""Memory and CPU time of a process and all that descend from it. Knows Linux's /proc, else psutil.

RSS counts a page once in every process that maps it, so the sum over a tree is too high by what is
shared; PSS shares it out, but reading it walks the page tables. A child that leaves its tree (a
daemon: its parent ended, and init adopted it) is not found.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec

PROC = Path("/proc")
SHARE = 0.005  # of a core, for each of the two things that may take long
PSS_EVERY_S = 10.0


class TreeUsage(msgspec.Struct, kw_only=True):
    """Sums over the processes of a tree at one moment.

    `hwm_bytes` sums the highest RSS that each process ever had: an upper bound of the tree's peak,
    because they need not have had it at the same time; it sees peaks between two readings.
    `cpu_s` includes children that have ended and were waited for.
    """

    rss_bytes: int = 0
    pss_bytes: int | None = None  # None: not asked for, or not readable
    hwm_bytes: int | None = None
    cpu_s: float = 0.0
    num_threads: int = 0
    pids: list[int] = []


class MachineUsage(msgspec.Struct, kw_only=True):
    """The whole machine: seconds that its CPUs were busy since boot, and memory in use."""

    busy_cpu_s: float
    used_bytes: int
    total_bytes: int


class Tree:
    """A process tree that is read again and again.

    Looking for children takes a file per thread, and PSS a walk over the page tables: neither may
    take more than `SHARE` of the time, so a tree of many threads or much memory is looked at more
    seldom. Between two looks its processes are taken to be the same.
    """

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self.pid = pid
        self._proc = proc
        self._pids: list[int] = []
        self._look_at_s = self._pss_at_s = 0.0  # by time.monotonic()

    def read(self, *, with_pss: bool = False) -> TreeUsage | None:
        """What the tree uses now; None: the process has ended.

        Args:
            with_pss: whatever it takes; else PSS is read when it is due.
        """
        if self._proc == PROC and sys.platform != "linux":
            return _tree_usage_psutil(self.pid)
        started_s = time.monotonic()
        if started_s >= self._look_at_s:
            self._pids = tree(self.pid, self._proc)
            ended_s = time.monotonic()
            self._look_at_s = ended_s + (ended_s - started_s) / SHARE
            started_s = ended_s
        with_pss = with_pss or started_s >= self._pss_at_s
        found = usage_of(self._pids, with_pss=with_pss, proc=self._proc)
        if with_pss:
            ended_s = time.monotonic()
            self._pss_at_s = ended_s + max((ended_s - started_s) / SHARE, PSS_EVERY_S)
        return found


def tree_usage(pid: int) -> TreeUsage | None:
    """What a process tree uses now, without PSS; None: the process has ended."""
    if sys.platform != "linux":
        return _tree_usage_psutil(pid)
    return usage_of(tree(pid))


def usage_of(pids: list[int], *, with_pss: bool = False, proc: Path = PROC) -> TreeUsage | None:
    """What processes use together; None: all have ended."""
    found = TreeUsage(pss_bytes=0 if with_pss else None, hwm_bytes=0)
    for pid in pids:
        try:
            _add(found, pid, proc, with_pss)
        except (OSError, ValueError, IndexError):
            continue  # it ended while it was read
    return found if found.pids else None


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """The process and its descendants, parents first.

    Linux tells the children of each thread; processes are not searched, of which there may be
    thousands.
    """
    found = [pid]
    for one in found:  # grows while it is read
        for thread in _listed(proc / str(one) / "task"):
            told = _text(proc / str(one) / "task" / thread / "children")
            found += [child for child in map(int, told.split()) if child not in found]
    return found


def _add(found: TreeUsage, pid: int, proc: Path, with_pss: bool) -> None:
    directory = proc / str(pid)
    # The name in brackets may have spaces and brackets of its own.
    fields = (directory / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    found.cpu_s += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    if fields[0] == "Z":
        return  # it has ended: its memory is gone, its time is the parent's once it is waited for
    resident = int((directory / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found.num_threads += int(fields[17])
    found.rss_bytes += resident
    found.pids.append(pid)
    high = _kib(directory / "status", "VmHWM:")
    if found.hwm_bytes is not None:
        # The kernel brings VmHWM up to date now and then: it may lag behind what is resident now.
        found.hwm_bytes = None if high is None else found.hwm_bytes + max(high, resident)
    if with_pss and found.pss_bytes is not None:
        shared_out = _kib(directory / "smaps_rollup", "Pss:")
        found.pss_bytes = None if shared_out is None else found.pss_bytes + shared_out


def machine_usage(proc: Path = PROC) -> MachineUsage | None:
    """What the whole machine uses; None: it does not say.

    Time stolen by other virtual machines is not busy: it is theirs.
    """
    try:
        ticks = [int(told) for told in (proc / "stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    total, free = _kib(proc / "meminfo", "MemTotal:"), _kib(proc / "meminfo", "MemAvailable:")
    if total is None or free is None:
        return None
    user, nice, system, _idle, _iowait, irq, softirq = ticks[:7]
    busy = user + nice + system + irq + softirq
    return MachineUsage(
        busy_cpu_s=busy / os.sysconf("SC_CLK_TCK"), used_bytes=total - free, total_bytes=total
    )


def listening_pid(port: int, host: str = "127.0.0.1") -> int | None:
    """The process that listens on a port of this machine, if it may be known; else None."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    addresses = {"0.0.0.0", "::", host if host != "localhost" else "127.0.0.1"}
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.laddr and one.pid is not None:
            address, listened = one.laddr
            if listened == port and address in addresses:
                return one.pid
    return None


def _tree_usage_psutil(pid: int) -> TreeUsage | None:
    """The same where there is no /proc: without PSS and high-water marks."""
    import psutil

    found = TreeUsage()
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    for one in processes:
        try:
            with one.oneshot():
                times, memory = one.cpu_times(), one.memory_info()
                num_threads = one.num_threads()
        except psutil.Error:
            continue
        found.rss_bytes += memory.rss
        found.cpu_s += times.user + times.system
        found.cpu_s += getattr(times, "children_user", 0) + getattr(times, "children_system", 0)
        found.num_threads += num_threads
        found.pids.append(one.pid)
    return found if found.pids else None


def _kib(file: Path, label: str) -> int | None:
    """Bytes of a line such as `VmHWM:   1024 kB`."""
    for line in _text(file).splitlines():
        if line.startswith(label):
            return int(line.split()[1]) * 1024
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []

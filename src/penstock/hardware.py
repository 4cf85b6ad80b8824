"""What this machine has: processor, cores, memory, terminal. Standard library; Linux tells most."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

# Instruction sets that make a difference to us, as Linux names them.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

# Variable of the environment with the path of the terminal in front of which the user sits, for a
# process of ours whose own output goes elsewhere.
TERMINAL = "PENSTOCK_TERMINAL"


def cpu_name() -> str:
    """The processor's name, as well as it is known."""
    found = re.search(r"^model name\s*: (.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that the processor has."""
    found = re.search(r"^flags\s*: (.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in CPU_FEATURES if name in flags]


def num_usable_cores() -> int:
    """Cores that this process may run on, or as many as its cgroup gives it the time of."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    quota = _cgroup_cores(Path("/sys/fs/cgroup"), _text(Path("/proc/self/cgroup")))
    return num_cores if quota is None else min(num_cores, quota)


def _cgroup_cores(root: Path, own: str) -> int | None:
    """Whole cores' worth of time that the quotas of a process leave it, at least 1; None: no quota.

    Rounded down: threads that wait for one another are only as fast as one that has to pause.

    Args:
        root: where cgroups are mounted, v2 or v1; in a container its own is usually at the root.
        own: the text of the process's `/proc/self/cgroup`.
    """
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        cgroup = base / path.strip("/")
        for level in (cgroup, *cgroup.parents):
            if not level.is_relative_to(base):
                break
            if controllers:
                told = [_text(level / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                told = _text(level / "cpu.max").split()
            if len(told) == 2 and all(number.isdigit() for number in told) and int(told[1]):
                found.append(max(int(told[0]) // int(told[1]), 1))
    return min(found, default=None)


def has_nvidia_device(devices: Path = Path("/dev")) -> bool:
    """Whether the system shows an NVIDIA GPU; to say more takes a driver library, which is slow.

    Args:
        devices: where the system keeps its device files; under WSL the GPU's is `dxg`.
    """
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def nvidia_driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver; None: there is none, or it does not say."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _text(told))
    return found[1] if found else None


def available_memory_bytes() -> int:
    """Memory that this process may still take: what the system has free, within its cgroup."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        system = int(found[1]) * 1024 if found else 0
    else:
        system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    container = _cgroup_left_bytes(Path("/sys/fs/cgroup"))
    return system if container is None else min(system, container)


def _cgroup_left_bytes(root: Path) -> int | None:
    """What a container's limit leaves; None without one. Knows cgroup v2, then v1."""
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            stat = re.search(r"^inactive_file (\d+)", _text(limit.parent / "memory.stat"), re.M)
            reclaimable = int(stat[1]) if stat else 0  # page cache, as MemAvailable counts it
            return max(int(text) - int(used.read_text()) + reclaimable, 0)
    return None


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""

"""What is assumed of power where no counter says it: a dictionary for a run's header.

Owns the choice of the figures (the user's, else the rated power of a table) and their sources.
`energy` computes with it and needs no table. Nothing is guessed: without a figure there is
`absent` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.meters import power_table

CPUINFO = Path("/proc/cpuinfo")
# Lannelongue, Grealey and Inouye 2021, Green Algorithms, Advanced Science 8(12). Contested: others
# measured far less per module and more under load (its issue 14).
RAM_WATTS_PER_GB = 0.3725
RAM_SOURCE = "Green Algorithms (Lannelongue et al. 2021): 0.3725 W per GB"
USER = "the user's figure"


class Topology(msgspec.Struct, kw_only=True):
    """What the system says of its processors."""

    name: str
    num_cpus: int  # logical, of all packages
    num_packages: int
    is_virtual: bool


def topology(cpuinfo: Path = CPUINFO) -> Topology | None:
    """What /proc/cpuinfo says; None: there is none.

    In a container it tells of the whole host, in a virtual machine of the machine's share.
    """
    try:
        text = cpuinfo.read_text("utf-8", "replace")
    except OSError:
        return None
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    packages = set(re.findall(r"^physical id\s*: (\d+)$", text, re.MULTILINE))
    return Topology(
        name=names[0].strip() if names else "a processor without a name",
        num_cpus=len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or 1,
        num_packages=max(len(packages), 1),
        is_virtual=bool(re.search(r"^flags\s*:.*\bhypervisor\b", text, re.MULTILINE)),
    )


def power_model(
    *,
    tables: Path | None = None,
    cpu_watts: float | None = None,
    idle_watts: float | None = None,
    chip_threads: int | None = None,
    gpu_watts: float | None = None,
    gpu_names: Sequence[str] = (),
    whole_machine: bool = False,
    cpuinfo: Path = CPUINFO,
) -> dict[str, Any]:
    """What `energy` assumes where nothing is measured: `cpu`, `ram` and `gpus`.

    `cpu` has `busy_w` (this machine's CPUs, all busy), `idle_w` (none busy; or None), `num_cpus`,
    `source` and `explanation`, or `absent` with the reason. `gpus` has an entry with `busy_w`, or
    `absent`, for each GPU.

    Args:
        cpu_watts: power of this machine's CPUs when all are busy; overrides the table.
        idle_watts: when none is busy; only with `cpu_watts`.
        chip_threads: hardware threads of the whole package, for virtual machines.
        gpu_watts: power of a busy GPU; overrides the table.
        whole_machine: an arm without a process that was read is served by this machine.

    Raises:
        ConfigError: `idle_watts` without, or above, `cpu_watts`.
    """
    if idle_watts is not None and (cpu_watts is None or idle_watts > cpu_watts):
        told = "without `--cpu-watts`" if cpu_watts is None else f"more than `{cpu_watts}`"
        raise ConfigError(f"`--idle-watts` is `{idle_watts}`, {told}.")
    folder = power_table.directory(tables)
    found = topology(cpuinfo)
    return {
        "cpu": _cpu(found, folder, cpu_watts, idle_watts, chip_threads),
        "ram": {"watts_per_gb": RAM_WATTS_PER_GB, "source": RAM_SOURCE},
        "gpus": [_gpu(name, folder, gpu_watts) for name in gpu_names],
        "whole_machine": whole_machine,
    }


def _cpu(
    found: Topology | None,
    folder: Path | None,
    cpu_watts: float | None,
    idle_watts: float | None,
    chip_threads: int | None,
) -> dict[str, Any]:
    if found is None:
        return {"absent": "the system does not tell its processors"}
    if cpu_watts is not None:
        return {
            "busy_w": cpu_watts,
            "idle_w": idle_watts,
            "num_cpus": found.num_cpus,
            "source": USER,
            "explanation": f"modelled from {USER}: {cpu_watts:g} W with all CPUs busy"
            + ("" if idle_watts is None else f", {idle_watts:g} W with none"),
        }
    match = power_table.cpu(found.name, folder)
    if match.watts is None:
        return {"absent": f"no power of the CPU: {match.explanation}; give --cpu-watts"}
    if found.is_virtual and chip_threads is None:
        return {
            "absent": f"{match.explanation}, but this is a virtual machine with an unknown share "
            "of it; give --chip-threads or --cpu-watts"
        }
    if chip_threads is not None and chip_threads * found.num_packages < found.num_cpus:
        raise ConfigError(
            f"`--chip-threads` is `{chip_threads}`, less than the `{found.num_cpus}` of this "
            "machine."
        )
    watts = match.watts * found.num_packages
    if chip_threads is not None:
        watts = match.watts * found.num_cpus / chip_threads
    return {
        "busy_w": watts,
        "idle_w": None,
        "num_cpus": found.num_cpus,
        "source": match.source,
        "explanation": f"modelled from rated power: {match.explanation}, {watts:g} W for this "
        f"machine's {found.num_cpus} CPUs",
    }


def _gpu(name: str, folder: Path | None, gpu_watts: float | None) -> dict[str, Any]:
    if gpu_watts is not None:
        told = f"modelled from {USER}: {gpu_watts:g} W"
        return {"name": name, "busy_w": gpu_watts, "source": USER, "explanation": told}
    match = power_table.gpu(name, folder)
    if match.watts is None:
        return {"name": name, "absent": f"no power of the GPU: {match.explanation}"}
    told = f"modelled from rated power: {match.explanation}"
    return {"name": name, "busy_w": match.watts, "source": match.source, "explanation": told}

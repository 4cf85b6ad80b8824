"""What can be measured on this machine, and what is assumed where it cannot: lines for people."""

from __future__ import annotations

from typing import Any

from penstock.measure.meters import memory
from penstock.measure.meters.sampler import Meters


def describe(settings: dict[str, Any] | None = None, meters: Meters | None = None) -> list[str]:
    """A line per meter, with the reason where there is none.

    Args:
        settings: what `settings.prepare` made: adds what is assumed of power and electricity.
        meters: what was found; by default it is looked for.
    """
    found = meters or Meters()
    zones = ", ".join(zone.name for zone in found.rapl.zones)
    lines = [f"RAPL: {zones}" if zones else f"RAPL: not readable: {found.rapl.why}"]
    lines.append(f"NVML: {_gpus(found)}")
    usage = memory.machine_usage(found.proc)
    lines.append(
        "memory and CPU time: this system does not tell those of the machine"
        if usage is None
        else f"memory and CPU time: per process tree, of {usage.total_bytes / 2**30:.1f} GiB"
    )
    if settings is not None:
        power, carbon = settings["power"], settings["carbon"]
        lines.append(f"CPU power without RAPL: {_told(power['cpu'])}")
        lines += [f"GPU power without NVML: {gpu['name']}: {_told(gpu)}" for gpu in power["gpus"]]
        lines.append(f"CO2: {_told(carbon)}")
    return lines


def _gpus(found: Meters) -> str:
    if found.gpus is None:
        return f"no GPU is measured: {found.why_no_gpus}"
    told = []
    for name, one in zip(found.gpus.names, found.gpus.read(), strict=True):
        how = "power, integrated" if one.energy_mj is None else "energy counter"
        if one.energy_mj is None and one.power_w is None:
            how = "neither energy nor power"
        told.append(f"{name} ({how})")
    return ", ".join(told)


def _told(entry: dict[str, Any]) -> str:
    return str(entry.get("explanation") or f"absent: {entry['absent']}")

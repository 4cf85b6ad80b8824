"""Energy of a window or a phase, from samples: measured where a counter says it, else modelled.

Pure: samples, marks and a run's settings in, joules out. Every part (CPU, memory, each GPU) carries
its label and source; a total of both kinds says so, and one that lacks a part is absent. Counters
are of the whole machine: whatever else ran in the window, the client included, is in them.

A request has no energy of its own under batching: the energy of the steady window is divided by
what was produced in it (`per`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from penstock.measure.meters.series import Interval, Series, phases
from penstock.measure.records import Record

Label = Literal["measured", "modelled", "measured and modelled", "absent"]
IDLE = "idle"
GB = 1e9
ELSEWHERE = "no process of it was read on this machine, so it may run elsewhere (--whole-machine)"


class Part(msgspec.Struct, kw_only=True):
    """Energy of one component: `cpu`, `ram`, `gpu0`, ...

    `joules_net` is without what the component takes when nothing runs; None: not known.
    """

    component: str
    joules_gross: float | None
    joules_net: float | None
    label: Label
    source: str  # `rapl`, `nvml`, `model`
    explanation: str


class Energy(msgspec.Struct, kw_only=True):
    """Energy of a window. None: absent, and `explanation` says why."""

    joules_gross: float | None
    joules_net: float | None
    label: Label
    source: str  # of the parts, such as `rapl + nvml`
    explanation: str
    parts: list[Part] = []
    duration_s: float = 0.0


def energy(
    records: Sequence[Record],
    arm: str | None,
    begin_ns: int,
    end_ns: int,
    settings: dict[str, Any],
) -> Energy:
    """Energy of a window, attributed to an arm.

    What is measured is the machine's in that time; what is modelled is from the CPU time and memory
    of the arm's processes. Net subtracts the power of the first phase `idle`, which `measure_idle`
    marks before anything is loaded. An arm of which no process was read here may run elsewhere: it
    has no energy, unless the user said that this machine is the server's (`--whole-machine`).

    Args:
        arm: its name; None: the machine itself.
        settings: `Header.settings`; `power` in it is from `power_model`.
    """
    model = settings.get("power") or {}
    window = Interval(name="", arm=arm or "", stage="", begin_ns=begin_ns, end_ns=end_ns)
    idle = next((one for one in phases(records) if one.name == IDLE), None)
    meters = Series(records)
    is_tree = arm is not None and bool(meters.names("proc", arm))
    if arm is not None and not is_tree and not model.get("whole_machine"):
        return _total([_absent("all", ELSEWHERE)], window.duration_s)
    parts = [
        _cpu(meters, window, idle, model.get("cpu") or {"absent": "no model of power"}, is_tree),
        _ram(meters, window, idle, model.get("ram") or {}, is_tree),
        *_gpus(meters, window, idle, model.get("gpus") or []),
    ]
    return _total(parts, window.duration_s)


def energy_of(
    records: Sequence[Record],
    arm: str | None,
    windows: Sequence[tuple[int, int]],
    settings: dict[str, Any],
) -> Energy:
    """Energy of several windows (begin and end in ns), such as an arm's blocks, together."""
    every = [energy(records, arm, begin_ns, end_ns, settings) for begin_ns, end_ns in windows]
    parts: dict[tuple[str, str], list[Part]] = {}  # by component and label
    for part in (part for one in every for part in one.parts):
        parts.setdefault((part.component, part.label), []).append(part)
    sums = [
        Part(
            component=some[0].component,
            joules_gross=_sum([part.joules_gross for part in some]),
            joules_net=_sum([part.joules_net for part in some]),
            label=some[0].label,
            source=some[0].source,
            explanation=f"{len(some)} windows; the last: {some[-1].explanation}",
        )
        for some in parts.values()
    ]
    return _total(sums, sum(one.duration_s for one in every))


def per(joules: float | None, count: int) -> float | None:
    """Joules per token, answer or request; None without either."""
    return None if joules is None or count <= 0 else joules / count


def _measured(
    component: str,
    source: str,
    what: str,
    read: Callable[[Interval], float | None],
    window: Interval,
    idle: Interval | None,
) -> Part | None:
    """A part from a counter; None: readings do not cover the window."""
    gross = read(window)
    if gross is None:
        return None
    idle_j = None if idle is None else read(idle)
    told = f"{what}, whole machine"
    if idle is None or idle_j is None:
        net = None
        told += "; net unknown: no idle phase was measured"
    else:
        idle_w = idle_j / idle.duration_s
        net = gross - idle_w * window.duration_s
        told += f"; idle {idle_w:.3g} W, measured for {idle.duration_s:.3g} s before"
    return Part(
        component=component,
        joules_gross=gross,
        joules_net=net,
        label="measured",
        source=source,
        explanation=told,
    )


def _absent(component: str, why: str) -> Part:
    return Part(
        component=component,
        joules_gross=None,
        joules_net=None,
        label="absent",
        source="",
        explanation=why,
    )


def _rapl(
    meters: Series, component: str, prefix: str, window: Interval, idle: Interval | None
) -> Part | None:
    zones = [name for name in meters.names("rapl") if name.startswith(prefix)]
    if not zones:
        return None

    def read(one: Interval) -> float | None:
        steps = [meters.step("rapl", "", zone, one) for zone in zones]
        known = [step for step in steps if step is not None]
        return sum(known) if len(known) == len(zones) else None

    return _measured(component, "rapl", f"RAPL {', '.join(zones)}", read, window, idle)


def _cpu(
    meters: Series, window: Interval, idle: Interval | None, model: dict[str, Any], is_tree: bool
) -> Part:
    if part := _rapl(meters, "cpu", "package", window, idle):
        return part
    if "absent" in model:
        return _absent("cpu", model["absent"])
    source, name, told = "machine", "busy_cpu_s", "CPU time of the whole machine"
    if is_tree:
        source, name, told = "proc", "cpu_s", "CPU time of the process tree"
    busy_s = meters.step(source, window.arm if is_tree else "", name, window)
    if busy_s is None:
        return _absent("cpu", "no readings of CPU time cover the window")
    idle_w = model.get("idle_w")
    active_j = (model["busy_w"] - (idle_w or 0.0)) * busy_s / model["num_cpus"]
    explanation = f"{model['explanation']}; {told}: {busy_s:.4g} s of {model['num_cpus']} CPUs"
    if idle_w is None:
        explanation += "; net unknown: no idle power (--idle-watts)"
    return Part(
        component="cpu",
        joules_gross=active_j + (idle_w or 0.0) * window.duration_s,
        joules_net=None if idle_w is None else active_j,
        label="modelled",
        source="model",
        explanation=explanation,
    )


def _ram(
    meters: Series, window: Interval, idle: Interval | None, model: dict[str, Any], is_tree: bool
) -> Part:
    if part := _rapl(meters, "ram", "dram", window, idle):
        return part
    if "watts_per_gb" not in model:
        return _absent("ram", "no model of the memory's power")
    source, name, told = "machine", "used_bytes", "the whole machine"
    if is_tree:
        source, name, told = "proc", "rss_bytes", "the process tree"
    byte_s = meters.integral(source, window.arm if is_tree else "", name, window)
    if byte_s is None:
        return _absent("ram", "no readings of memory cover the window")
    joules = byte_s / GB * model["watts_per_gb"]
    mean_gb = byte_s / GB / window.duration_s
    return Part(
        component="ram",
        joules_gross=joules,
        joules_net=joules,
        label="modelled",
        source="model",
        explanation=f"{model['source']}, x {mean_gb:.3g} GB of {told}; net is gross: "
        "it is not there when nothing runs",
    )


def _gpus(
    meters: Series, window: Interval, idle: Interval | None, models: Sequence[dict[str, Any]]
) -> list[Part]:
    names = meters.names("nvml")
    seen = {name.partition("_")[0] for name in names if name.startswith("gpu")}
    known = {f"gpu{index}": model for index, model in enumerate(models)}
    return [
        _gpu(meters, gpu, window, idle, known.get(gpu) or {"absent": "no model of its power"})
        for gpu in sorted(seen | known.keys())
    ]


def _gpu(
    meters: Series,
    gpu: str,
    window: Interval,
    idle: Interval | None,
    model: dict[str, Any],
) -> Part:
    def counter(one: Interval) -> float | None:
        return meters.step("nvml", "", f"{gpu}_j", one)

    def power(one: Interval) -> float | None:
        return meters.integral("nvml", "", f"{gpu}_power_w", one)

    for what, read in (("NVML energy counter", counter), ("NVML power, integrated", power)):
        if part := _measured(gpu, "nvml", what, read, window, idle):
            return part
    if "absent" in model:
        return _absent(gpu, model["absent"])
    busy_s = meters.integral("nvml", "", f"{gpu}_utilization", window)
    told = "its utilisation" if busy_s is not None else "as if always busy: an upper bound"
    return Part(
        component=gpu,
        joules_gross=model["busy_w"] * (window.duration_s if busy_s is None else busy_s),
        joules_net=None,
        label="modelled",
        source="model",
        explanation=f"{model['explanation']}, x {told}; net unknown: no idle power of the GPU",
    )


def _total(parts: list[Part], duration_s: float) -> Energy:
    missing = [part for part in parts if part.label == "absent"]
    sources = list(dict.fromkeys(part.source for part in parts if part.source))
    label: Label = "measured"
    if missing:
        label = "absent"
    elif any(part.label == "modelled" for part in parts):
        label = "measured and modelled" if "rapl" in sources or "nvml" in sources else "modelled"
    told = missing or parts
    return Energy(
        joules_gross=_sum([part.joules_gross for part in parts]),
        joules_net=_sum([part.joules_net for part in parts]),
        label=label,
        source=" + ".join(sources),
        explanation="; ".join(f"{part.component}: {part.explanation}" for part in told),
        parts=parts,
        duration_s=duration_s,
    )


def _sum(joules: Sequence[float | None]) -> float | None:
    """The sum; None if one is not known, or there is none."""
    known = [one for one in joules if one is not None]
    return sum(known) if known and len(known) == len(joules) else None

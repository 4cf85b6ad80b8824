"""The meters' figures of a window: memory, CPU time, energy, carbon and money, in one dictionary.

Pure: what load, engines and verdict put into their own figures, and print. Every figure that is
None has its reason beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.measure.meters import carbon, energy, prices
from penstock.measure.meters.series import Interval, Series, phases
from penstock.measure.records import Record, Request, Sample

MEMORY_FORMULAS = {
    "peak_rss_bytes": "maximum over readings of the sum of RSS over the process tree; shared pages "
    "count in each process",
    "peak_pss_bytes": "the same with shared pages shared out; read more seldom",
    "hwm_bytes": "sum of each process's own peak since its start: an upper bound of the tree's "
    "peak, which sees what readings miss",
}
FORMULAS = {
    **MEMORY_FORMULAS,
    "joules_gross": "energy of the window, by counters of the machine or by the model",
    "joules_net": "joules_gross - power of the idle phase x duration",
    "joules_per_output_token": "joules_gross / output tokens of the window",
    "joules_per_success": "joules_gross / successful answers of the window",
    "gco2": "joules_gross / 3.6e6 x gCO2e per kWh",
}


def memory_figures(
    records: Sequence[Record], arm: str, begin_ns: int | None = None, end_ns: int | None = None
) -> dict[str, float | int | str | None]:
    """Memory and CPU time of an arm's process tree in a window, else in the whole run."""
    low = -1 if begin_ns is None else begin_ns
    high = float("inf") if end_ns is None else end_ns
    inside = [one for one in records if isinstance(one, Sample) and low <= one.t_ns <= high]
    own = [one.values for one in inside if one.source == "proc" and one.arm == arm]
    on_gpu = [one.values for one in inside if one.source == "nvml" and one.arm == arm]
    devices = [one.values for one in inside if one.source == "nvml" and not one.arm]

    def peak(readings: list[dict[str, float]], name: str) -> float | None:
        return max((one[name] for one in readings if name in one), default=None)

    peak_gpu, gpu_source = peak(on_gpu, "gpu_bytes") if arm else None, "processes of the arm"
    if peak_gpu is None and own:  # an arm that runs elsewhere has no GPU here
        used = [
            sum(value for name, value in one.items() if name.endswith("_used_bytes"))
            for one in devices
        ]
        peak_gpu, gpu_source = max(used, default=None), "whole GPUs"
    cpu_s = None
    if own:
        times = [one.t_ns for one in inside if one.source == "proc" and one.arm == arm]
        begin_ns = times[0] if begin_ns is None else begin_ns
        end_ns = times[-1] if end_ns is None else end_ns
        window = Interval(name="", arm=arm, stage="", begin_ns=begin_ns, end_ns=end_ns)
        cpu_s = Series(records).step("proc", arm, "cpu_s", window)
    return {
        "peak_rss_bytes": peak(own, "rss_bytes"),
        "peak_pss_bytes": peak(own, "pss_bytes"),
        "hwm_bytes": peak(own, "hwm_bytes"),
        "peak_gpu_bytes": peak_gpu,
        "gpu_bytes_of": gpu_source if peak_gpu is not None else None,
        "cpu_s": cpu_s,
        "peak_threads": peak(own, "threads"),
        "peak_processes": peak(own, "processes"),
        "num_samples": len(own),
        "why_none": None if own else "no process of this arm was read on this machine",
    }


def meter_figures(
    records: Sequence[Record],
    settings: dict[str, Any],
    *,
    arm: str = "",
    begin_ns: int,
    end_ns: int,
    num_output_tokens: int = 0,
    num_success: int = 0,
) -> dict[str, Any]:
    """Memory, energy, carbon and the machine's price of a window.

    Args:
        settings: `Header.settings`, with what `meters.settings.prepare` made.
        num_output_tokens: that were produced in the window.
        num_success: successful answers in the window.
    """
    used = energy.energy(records, arm, begin_ns, end_ns, settings)
    emitted = carbon.grams(used.joules_gross, settings)
    paid = prices.machine_cost(settings, used.duration_s, used.joules_gross)
    return {
        "memory": memory_figures(records, arm, begin_ns, end_ns),
        "energy": {
            **msgspec.to_builtins(used),
            "joules_per_output_token": energy.per(used.joules_gross, num_output_tokens),
            "joules_per_success": energy.per(used.joules_gross, num_success),
            "net_joules_per_output_token": energy.per(used.joules_net, num_output_tokens),
            "net_joules_per_success": energy.per(used.joules_net, num_success),
        },
        "carbon": msgspec.to_builtins(emitted),
        "machine_cost": {
            **msgspec.to_builtins(paid),
            "usd_per_success": energy.per(paid.usd, num_success),
        },
        "meter_cost": meter_cost(records),
    }


def phase_figures(records: Sequence[Record], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Energy of every phase that was marked (`Sampler.phase`): load, idle, prefill, decode, ..."""
    return [
        {
            "phase": one.name,
            "arm": one.arm,
            "stage": one.stage,
            "duration_s": one.duration_s,
            "energy": msgspec.to_builtins(
                energy.energy(records, one.arm or None, one.begin_ns, one.end_ns, settings)
            ),
        }
        for one in phases(records)
    ]


def token_cost(rows: Sequence[Request]) -> dict[str, Any]:
    """What requests cost by their tokens, with the prices that were used, and what was missing."""
    told = {True: set[str](), False: set[str]()}
    for row in rows:
        told[row.usd is not None].add(row.usd_source or "no price was looked up")
    return {
        **msgspec.to_builtins(prices.cost_per_success(rows)),
        "sources": sorted(told[True]),
        "why_unknown": sorted(told[False]),
    }


def meter_cost(records: Sequence[Record]) -> dict[str, float] | None:
    """What the meters themselves took: readings, CPU seconds, seconds."""
    found = [one for one in records if isinstance(one, Sample) and one.source == "meter"]
    return dict(found[-1].values) if found else None

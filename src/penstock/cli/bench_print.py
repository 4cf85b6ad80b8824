"""A bench in the terminal: the figures in a few lines, and what to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.measure import metrics
from penstock.measure.load import notes
from penstock.measure.report.units import percent, quantity, seconds

_SHOWN = ("ttft_from_due_s", "ttft_s", "tpot_s", "e2e_from_due_s", "e2e_s", "queue_s")
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def text(figures: Mapping[str, Any]) -> str:
    """The figures of a bench."""
    stages: list[Mapping[str, Any]] = figures["stages"]
    lines = _one(stages[0]) if len(stages) == 1 else _many(stages) if stages else []
    if figures["search"]:
        lines += ["", notes.answer(figures["search"])]
    if figures["notes"]:
        lines += ["", *(f"- {note}" for note in figures["notes"])]
    return "\n".join(lines).strip("\n")


def _one(stage: Mapping[str, Any]) -> list[str]:
    requests, rate, tokens = stage["requests"], stage["rate"], stage["tokens"]
    counts = f"{requests['num_ok']} of {requests['num']} answered"
    counts += f", {requests['num_errors']} failed, {requests['num_cut']} cut"
    rates = [
        f"{name} {quantity(rate[f'{field}_per_s'])}"
        for name, field in (
            ("asked for", "requested"),
            ("scheduled", "scheduled"),
            ("sent", "achieved"),
            ("answered", "answered"),
        )
        if rate[f"{field}_per_s"] is not None
    ]
    facts = {
        "requests": counts,
        "a second": ", ".join(rates),
        "window": f"{seconds(stage['window']['duration_s'])}, {stage['loop']} loop, "
        f"{quantity(stage['in_flight']['mean'])} in flight",
        "tokens/s": f"{quantity(tokens['output_per_s'])} out, "
        f"{quantity(tokens['total_per_s'])} in and out",
    }
    if tokens["cached_share"] is not None:
        facts["cached"] = f"{percent(tokens['cached_share'])} of prompt tokens"
    if stage["goodput"] is not None:
        good = stage["goodput"]
        facts["good"] = f"{percent(good['share'])} ({quantity(good['per_s'])} a second): "
        facts["good"] += ", ".join(good["limits"])
    facts |= _money(stage)
    energy = stage["meters"]["energy"]
    if energy["joules_per_output_token"] is not None:
        facts["energy"] = (
            f"{quantity(energy['joules_per_output_token'], 'J')} an output token, {energy['label']}"
        )
    lines = [f"{name:<10} {value}" for name, value in facts.items()]
    width = max(len(metrics.TITLES[name]) for name in _SHOWN) + 1
    heads = "".join(f"{mark:>9}" for mark in (*_QUANTILES, "max"))
    lines += ["", f"{'':<{width}}{'n':>6}{heads}"]
    for name in _SHOWN:
        made = stage["latency"][name]
        if made["n"]:
            cells = [_cell(made, mark, q) for mark, q in _QUANTILES.items()]
            cells.append(seconds(made["max"]))
            told = "".join(f"{cell:>9}" for cell in cells)
            lines.append(f"{metrics.TITLES[name]:<{width}}{made['n']:>6}{told}")
    if any(not metrics.is_supported(stage["latency"]["e2e_s"]["n"], q) for q in (0.95, 0.99)):
        lines.append("* fewer than 10 requests lie beyond it")
    return [*lines, *_limits(stage)]


def _money(stage: Mapping[str, Any]) -> dict[str, str]:
    """What answers cost, by tokens or by the hour of the machine, as far as it is known."""
    bought, machine = stage["cost"], stage["meters"]["machine_cost"]
    facts = {}
    if bought["usd_per_success"] is not None:
        each = quantity(bought["usd_per_success"], "usd")
        facts["bought"] = f"{each} an answer ({', '.join(bought['sources'])})"
    if machine["usd_per_success"] is not None:
        each = quantity(machine["usd_per_success"], "usd")
        facts["machine"] = f"{each} an answer ({machine['explanation']})"
    return facts


def _cell(made: Mapping[str, Any], name: str, q: float) -> str:
    return seconds(made[name]) + ("" if metrics.is_supported(made["n"], q) else "*")


def _limits(stage: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{one['limit']}: {notes.outcome(one)}, "
        f"{'not reached' if one['value'] is None else quantity(one['value'])} (n = {one['n']})"
        for one in stage["slo"]
    ]
    return ["", *lines] if lines else []


def _many(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("answered/s", "failed", "tokens/s", "ttft p50", "ttft p95", "tpot p50", "e2e p95")
    width = max(len(stage["stage"]) for stage in stages) + 2
    lines = [f"{'':<{width}}" + "".join(f"{head:>12}" for head in heads) + "  limits"]
    for stage in stages:
        latency = stage["latency"]
        cells = [
            quantity(stage["rate"]["answered_per_s"]),
            str(stage["requests"]["num_errors"]),
            quantity(stage["tokens"]["output_per_s"]),
            seconds(latency["ttft_from_due_s"]["p50"]),
            seconds(latency["ttft_from_due_s"]["p95"]),
            seconds(latency["tpot_s"]["p50"]),
            seconds(latency["e2e_from_due_s"]["p95"]),
        ]
        broken = [f"{one['limit']} {notes.outcome(one)}" for one in stage["slo"] if not one["kept"]]
        told = ", ".join(broken) if broken else "kept" if stage["slo"] else ""
        lines.append(
            f"{stage['stage']:<{width}}" + "".join(f"{cell:>12}" for cell in cells) + f"  {told}"
        )
    return lines

"""The parts of a comparison's page about load: speed, noise, memory, energy, cost. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.measure import metrics
from penstock.measure.records import Header, Record, Request
from penstock.measure.report import plots, tables, units
from penstock.measure.report.axes import Axis
from penstock.measure.report.html import Html
from penstock.measure.report.page import Section
from penstock.measure.report.tables import Absent, Column, Marked
from penstock.measure.verdict import speed


def speed_sections(
    found: Mapping[str, Any] | None, header: Header, records: Sequence[Record]
) -> list[Section]:
    if found is None:
        return []
    parts: list[str] = [
        (
            "Open loop: requests come on a schedule, and times count from when they were due."
            if found["is_open_loop"]
            else "Closed loop: each client sends its next request when the last was answered, so "
            "this is capacity, not what users wait."
        )
        + " Answers have a fixed length. The block is the unit: A B B A, same prompts.",
        _metrics(found["metrics"]),
        _quantiles(found["quantiles"]),
        *_distributions(found, header, records),
        _blocks(found["blocks"], found["primary"], "Blocks"),
    ]
    return [Section("Speed", parts), Section("Noise floor", _noise(found))]


def _metrics(rows: Sequence[Mapping[str, Any]]) -> Html:
    return tables.table(
        [
            Column("metric", help="mean over blocks"),
            "base",
            "variant",
            Column("B / A"),
            Column("95 % interval", help="Student's, of the log ratios of blocks"),
            Column("block bootstrap", help="too narrow with few blocks"),
            Column("variation", help="coefficient of variation of blocks, base and variant"),
            Column("p (Holm)"),
        ],
        [
            [
                row["metric"],
                _value(row["metric"], row["a"]),
                _value(row["metric"], row["b"]),
                row["ratio"]["estimate"],
                _ends(row["ratio"]),
                _ends(row["bootstrap"]),
                f"{100 * row['cv_a']:.1f} % and {100 * row['cv_b']:.1f} %",
                row["p_holm"],
            ]
            for row in rows
        ],
    )


def _value(metric: str, value: float) -> str:
    if metric == speed.THROUGHPUT:
        return f"{units.number(float(value))} tokens/s"
    return units.seconds(value)


def _ends(interval: Mapping[str, Any] | None) -> Any:
    if interval is None or interval["low"] is None or interval["high"] is None:
        return Absent("too few blocks, or fewer than 10 values beyond the quantile")
    return f"{interval['low']:.3g} to {interval['high']:.3g}"


def _quantiles(rows: Sequence[Mapping[str, Any]]) -> Html:
    made = []
    for row in rows:
        few = not all(metrics.is_supported(num, row["q"]) for num in row["n"])
        cells = [
            Marked(units.seconds(row[arm]), "fewer than 10 values beyond it")
            if few
            else units.seconds(row[arm])
            for arm in "ab"
        ]
        name = f"{row['metric']} p{100 * row['q']:g}"
        made.append([name, min(row["n"]), *cells, _ratio(row["ratio"]), _ends(row["ratio"])])
    return tables.table(["quantile", "n", "base", "variant", "B / A", "95 % interval"], made)


def _ratio(interval: Mapping[str, Any] | None) -> Any:
    return Absent("too few values") if interval is None else interval["estimate"]


def _distributions(
    found: Mapping[str, Any], header: Header, records: Sequence[Record]
) -> list[Html]:
    rows = [
        row
        for row in records
        if isinstance(row, Request) and row.stage == speed.SPEED and row.phase == "steady"
    ]
    made = []
    for name in speed.latencies(found["is_open_loop"]):
        figure = metrics.OF_REQUEST[name]
        samples = {
            arm.name: [
                value
                for row in rows
                if row.arm == arm.name and row.ok and (value := figure(row)) is not None
            ]
            for arm in header.arms
        }
        note = metrics.FORMULAS[name]
        made.append(
            plots.ecdf(samples, Axis(name, "s"), title=f"Distribution of {name}", note=note)
        )
    return made


def _blocks(rows: Sequence[Mapping[str, Any]], metric: str, caption: str) -> Html:
    return tables.table(
        ["block", "first", "A", "B", Column("log(B / A)")],
        [
            [
                str(row["block"]),
                row["first"].upper(),
                Absent("no whole answer") if row["a"] is None else _value(metric, row["a"]),
                Absent("no whole answer") if row["b"] is None else _value(metric, row["b"]),
                row["log_ratio"],
            ]
            for row in rows
        ],
        caption=f"{caption}: {metric}",
    )


def _noise(found: Mapping[str, Any]) -> list[str]:
    noise = found["noise"]
    if "floor" not in noise:
        return ["The base was not run against itself: no noise floor is known."]
    parts = [
        f"The base against itself in {len(noise['blocks'])} blocks: {noise['bias']:+.2f} % "
        f"(p = {noise['p']:.3g}), spread {noise['spread']:.2f} % from block to block. No "
        f"difference below {noise['floor']:.2f} % is believed in {len(found['blocks'])} blocks.",
        _blocks(noise["blocks"], found["primary"], "The base against itself"),
    ]
    if noise.get("power_5_percent_slower") is not None:
        parts.append(
            "With this noise, a variant that is 5 % slower would be found `worse` with a "
            f"probability of {units.percent(noise['power_5_percent_slower'])}."
        )
    return parts


# --- memory, energy, cost ------------------------------------------------------------------------


def resources_section(figures: Mapping[str, Any], header: Header) -> Section:
    names = [arm["name"] for arm in figures["arms"]]
    memory = tables.table(
        ["arm", Column("RSS", "bytes"), Column("GPU", "bytes"), Column("high water", "bytes")],
        [
            [name, peak["host_bytes"], peak["gpu_bytes"], peak["high_water_bytes"]]
            for name, peak in zip(names, figures["memory"], strict=True)
        ],
        caption="Peak memory of the arm's processes (high water: since their start)",
    )
    energy, cost = figures["energy"], figures["cost"]
    parts: list[str] = [memory, f"Energy: {energy['label'] or 'absent'}. {energy['explanation']}."]
    if energy["blocks"]:
        parts.append(
            tables.table(
                ["block", Column("A", "J"), Column("B", "J")],
                [[str(row["block"]), row["a"], row["b"]] for row in energy["blocks"]],
                caption="Joules per output token, by block",
            )
        )
    if cost["arms"]:
        parts.append(_per_success(names, cost, energy))
    sources = [*cost["sources"], *_machine(header)]
    parts.append(f"Prices: {'; '.join(sources) or 'none was given'}.")
    return Section("Memory, energy, cost", parts)


def _machine(header: Header) -> list[str]:
    price = header.settings.get("machine_price") or {}
    named = {"usd_per_hour": "USD per hour", "usd_per_kwh": "USD per kWh"}
    return [f"{value:g} {named[name]}" for name, value in price.items() if value is not None]


def _per_success(names: Sequence[str], cost: Mapping[str, Any], energy: Mapping[str, Any]) -> Html:
    rows: list[list[Any]] = []
    for name, sums in zip(names, cost["arms"], strict=True):
        usd, joules = sums["usd_per_success"], sums["joules_per_success"]
        rows.append(
            [
                name,
                sums["num_asked"],
                sums["num_success"],
                _amount(usd, "usd", _why_none(sums, "usd", "no price, or not of every answer")),
                _amount(joules, "J", _why_none(sums, "joules", "no energy")),
            ]
        )
    ratios = [found["per_success_ratio"] for found in (cost, energy)]
    rows.append(
        ["B / A", Absent("a ratio"), Absent("a ratio")]
        + [
            Absent("not known")
            if one is None
            else f"{one['estimate']:.3g} ({_ends(one)})"
            if one["low"] is not None and one["high"] is not None
            else f"{one['estimate']:.3g}"
            for one in ratios
        ]
    )
    return tables.table(
        ["arm", "asked", "successes", "cost per success", "energy per success"],
        rows,
        caption=f"Per successful answer: {cost['success']}; 95 % intervals by Fieller, ratios by "
        "leaving out blocks",
    )


def _why_none(sums: Mapping[str, Any], name: str, unknown: str) -> str:
    if sums[name] is None:
        return unknown
    return "too few blocks" if sums["num_success"] else "no success"


def _amount(interval: Mapping[str, Any] | None, unit: str, why: str) -> Any:
    if interval is None:
        return Absent(why)
    told = units.quantity(interval["estimate"], unit)
    if interval["low"] is None or interval["high"] is None:
        return told
    return f"{told} ({units.interval(interval['low'], interval['high'], unit)})"

"""The leaderboard as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from penstock.measure.metrics import is_supported
from penstock.measure.records import Header, Record
from penstock.measure.report import plots
from penstock.measure.report.axes import Axis
from penstock.measure.report.page import Section, document, listing, provenance
from penstock.measure.report.tables import Absent, Column, Marked, table
from penstock.measure.report.units import percent
from penstock.measure.track.figures import drift_summary


def page(header: Header, figures: Mapping[str, Any], records: Sequence[Record]) -> str:
    """HTML of the figures of `track.figures`."""
    series = figures["series"]
    formulas = [f"{name}: {formula}" for name, formula in figures["formulas"].items()]
    return document(
        "Providers over time",
        [
            Section("Speed and price", [_cells(series), listing(formulas)]),
            Section("Over time", _timelines(series)),
            Section("Failures", [_failures(series)]),
            Section("Drift", [_drift(figures["drift"])]),
            provenance(header),
        ],
        summary=[drift_summary(figures["drift"])],
    )


def _few(marks: Mapping[str, Any], name: str) -> Any:
    value, num, share = marks[name], marks["n"], float(name[1:]) / 100
    if value is None:
        return Absent("no answer said it")
    # As many have to lie beyond a small percentile as beyond a large one.
    enough = is_supported(num, max(share, 1 - share))
    return value if enough else Marked(value, f"of {num} requests only")


def _cells(series: Mapping[str, Any]) -> str:
    columns: list[Column | str] = [
        "series",
        Column("in"),
        Column("out"),
        Column("at once"),
        Column("n"),
        Column("TTFT p50", "s"),
        Column("TTFT p90", "s"),
        Column("TTFT p99", "s"),
        Column("tokens/s p50"),
        Column("tokens/s p10"),
        Column("availability"),
        Column("$ per 1M output", "usd"),
    ]
    rows = [
        [
            name,
            cell["input_tokens"],
            cell["output_tokens"],
            cell["concurrency"],
            cell["ttft_s"]["n"],
            _few(cell["ttft_s"], "p50"),
            _few(cell["ttft_s"], "p90"),
            _few(cell["ttft_s"], "p99"),
            _few(cell["tokens_per_s"], "p50"),
            _few(cell["tokens_per_s"], "p10"),
            Absent("only refusals")
            if cell["availability"] is None
            else percent(cell["availability"]),
            _price(cell, one),
        ]
        for name, one in series.items()
        for cell in one["cells"]
    ]
    rows += [_silent(name, one, len(columns)) for name, one in series.items() if not one["cells"]]
    return table(columns, rows, caption="Of the answers that came")


def _silent(name: str, one: Mapping[str, Any], num_columns: int) -> list[Any]:
    """A series of which no speed was measured: it is a row all the same."""
    share = one["availability"]
    shown = Absent("not probed") if share is None else percent(share)
    none: list[Any] = [Absent("no request could be made")] * (num_columns - 3)
    return [name, *none, shown, Absent("no answer")]


def _price(cell: Mapping[str, Any], one: Mapping[str, Any]) -> Any:
    usd = cell["usd_per_1m_output_tokens"]
    return Absent(one["no_price"] or "no answer's cost is known") if usd is None else usd


def _timelines(series: Mapping[str, Any]) -> list[str]:
    starts = [point["slot"] for one in series.values() for point in one["by_slot"]]
    if not starts:
        return ["No slot was probed."]
    begin = min(starts)
    note = f"from {datetime.fromtimestamp(begin, UTC):%Y-%m-%d %H:%M} UTC; medians of a slot"

    hours = Axis("time", "h")
    drawn: list[str] = []
    # What is asked differs from cell to cell, so each has a plot of its own.
    for shape in sorted({_shape(point) for one in series.values() for point in one["by_slot"]}):
        for name, axis, title in (
            ("ttft_s", Axis("TTFT", "s"), "Time to first token"),
            ("tokens_per_s", Axis("tokens/s"), "Tokens per second"),
        ):
            lines = [
                plots.Series(who, points)
                for who, one in series.items()
                if (points := _points(one["by_slot"], shape, name, begin))
            ]
            asked = f"{shape[0]} tokens in, {shape[1]} out, {shape[2]} at once"
            drawn.append(plots.line(lines, hours, axis, title=f"{title}: {asked}", note=note))
    return drawn


def _shape(point: Mapping[str, Any]) -> tuple[int, int, int]:
    return point["input_tokens"], point["output_tokens"], point["concurrency"]


def _points(
    slots: Sequence[Mapping[str, Any]], shape: tuple[int, int, int], name: str, begin: int
) -> list[tuple[float, float | None]]:
    there = (point for point in slots if _shape(point) == shape)
    return [((point["slot"] - begin) / 3600, point[name]) for point in there]


def _failures(series: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            one["num_ok"],
            one["num_rate_limited"],
            ", ".join(f"{kind} {num}" for kind, num in one["errors"].items()) or "none",
            ", ".join(f"{state} {num}" for state, num in one["slots"].items()),
            "; ".join(f"{num} slots: {why}" for why, num in one["reasons"].items()) or "none",
        ]
        for name, one in series.items()
    ]
    return table(["series", "answered", "refused for the rate", "errors", "slots", "reasons"], rows)


def _drift(drifts: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            drift["series"],
            drift["what"],
            drift["reference"],
            drift["num_reference"],
            drift["num_window"],
            Absent("too few") if drift["p_value"] is None else f"{drift['p_value']:.2g}",
            f"{drift['alpha']:.2g}",
            "ALARM" if drift["alarm"] else "no",
        ]
        for drift in drifts
    ]
    return table(
        ["series", "what", "against", "n reference", "n window", "p", "alarm below", "alarm"], rows
    )

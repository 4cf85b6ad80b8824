"""The page, and the table for a terminal, of engines side by side. Knows figures, not records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.measure.records import Header, Record
from penstock.measure.report import page as pages
from penstock.measure.report import rows as plots
from penstock.measure.report.axes import Axis
from penstock.measure.report.html import Html
from penstock.measure.report.tables import Absent, Column, Marked, table
from penstock.measure.report.units import interval, quantity

KINDS = {
    "startup": "Start-up",
    "latency": "One request at a time",
    "throughput": "Throughput",
    "memory": "Memory",
}
# What is drawn of a stage; everything else is in its table.
DRAWN = {
    "startup": ("total_s",),
    "latency": ("ttft_s", "tpot_s"),
    "throughput": ("total_tokens_per_s", "output_tokens_per_s"),
    "memory": ("peak_rss_bytes",),
}
# What the page says first, with the figure and the stage put in.
TOLD = {
    ("startup", "total_s"): "first answer after {0}",
    ("latency", "ttft_s"): "first token in {0} ({1})",
    ("latency", "decode_tokens_per_s"): "then {0}",
    ("throughput", "output_tokens_per_s"): "{0} of answers ({1})",
    ("memory", "peak_rss_bytes"): "{0} of memory",
}
MAX_NAME = 24  # of an arm at the head of a column of a terminal's table


def page(header: Header, figures: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The page of a run of the kind `engines`."""
    kinds = _kinds(header)
    stages = list(dict.fromkeys(row["stage"] for row in figures["rows"]))
    sections = [_stage(stage, kinds.get(stage, stage), figures) for stage in stages]
    sections.append(_notes(header, figures))
    sections.append(pages.provenance(header))
    names = list(figures["arms"])
    title = "Engines side by side" if len(names) > 1 else f"Engine {names[0]}"
    return pages.document(
        title, sections, summary=_summary(header, figures), problems=figures["problems"]
    )


def _kinds(header: Header) -> dict[str, str]:
    return {work["stage"]: work["kind"] for work in header.settings["works"]}


def _summary(header: Header, figures: Mapping[str, Any]) -> list[str]:
    num_rounds = header.settings["num_rounds"]
    lines = [
        *sentences(figures, _kinds(header)),
        f"{len(figures['arms'])} arms in {num_rounds} round{'s' if num_rounds > 1 else ''}, each "
        "started anew in each round, every other round in the opposite order. A figure is the "
        "median over rounds (in brackets the extremes); a ratio is the median of each round's "
        f"ratio to {figures['first']}.",
    ]
    for name, arm in figures["arms"].items():
        lines += [f"{name} failed ({one['stage']}): {one['reason']}" for one in arm["failed"]]
    return [*lines, *figures["notes"]]


def sentences(figures: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """What it came to, in plain words: a sentence for each arm.

    Args:
        kinds: of the stages.
    """
    told = []
    for name in figures["arms"]:
        parts = [
            TOLD[key].format(_with_ratio(cell, row["unit"], name, figures["first"]), row["stage"])
            for row in figures["rows"]
            if (key := (kinds.get(row["stage"], row["stage"]), row["figure"])) in TOLD
            and (cell := row["arms"][name]) is not None
        ]
        if parts:
            told.append(f"{name}: {'; '.join(parts)}.")
    return told


def _with_ratio(cell: Mapping[str, Any], unit: str, name: str, first: str) -> str:
    """`12.1 ms (0.52 times that of brook)`."""
    value = quantity(cell["median"], unit)
    if name == first or cell["ratio"] is None:
        return value
    return f"{value} ({cell['ratio']:.2f} times that of {first})"


def _stage(stage: str, kind: str, figures: Mapping[str, Any]) -> pages.Section:
    """Plots and the table of a stage."""
    rows = [row for row in figures["rows"] if row["stage"] == stage]
    parts: list[str] = [_bars(row, figures) for row in rows if row["figure"] in DRAWN.get(kind, ())]
    names = list(figures["arms"])
    body = [
        [
            Marked(row["figure"], row["formula"]),
            *(_told(row, name, figures) for name in names),
        ]
        for row in rows
    ]
    parts.append(table([Column("figure"), *map(Column, names)], body))
    title = KINDS[kind] if stage == kind else f"{KINDS[kind]}: {stage}"
    return pages.Section(title, parts)


def _bars(row: Mapping[str, Any], figures: Mapping[str, Any]) -> Html:
    bars = [
        plots.Bar(
            name,
            None if cell is None else cell["median"],
            None if cell is None or cell["num_rounds"] < 2 else (cell["min"], cell["max"]),
        )
        for name, cell in row["arms"].items()
    ]
    title = f"{row['figure']} ({row['better']} is better)"
    axis = Axis(row["figure"], row["unit"])
    return plots.bars(bars, axis, title=title, note=row["formula"], interval_name="extremes")


def _told(row: Mapping[str, Any], name: str, figures: Mapping[str, Any]) -> Any:
    """Median, extremes, and the ratio to the first arm."""
    cell = row["arms"][name]
    if cell is None:
        return Absent(_reason(figures["arms"][name]))
    told = quantity(cell["median"], row["unit"])
    if cell["min"] != cell["max"]:
        told += f" [{interval(cell['min'], cell['max'], row['unit'])}]"
    if cell["ratio"] is not None and name != figures["first"]:
        told += f", {cell['ratio']:.3g}x"
    return told


def _reason(arm: Mapping[str, Any]) -> str:
    failed = arm["failed"]
    return failed[0]["reason"].partition("\n")[0] if failed else "it has no such figure"


def _notes(header: Header, figures: Mapping[str, Any]) -> pages.Section:
    """What was asked, what an arm does not honour, and where energy comes from."""
    works = table(
        ["stage", "requests", "at a time", "tokens in", "tokens out"],
        [
            [work[key] for key in ("stage", "num_requests", "concurrency", "num_in", "num_out")]
            for work in header.settings["works"]
        ],
    )
    lines = []
    if (trace := header.settings.get("trace")) is not None:
        lines.append(
            f"Lengths are of {trace['num_drawn']} of {trace['num_of_trace']} requests of "
            f"{trace['trace']}; {trace['num_clipped']} were clipped to a context of "
            f"{trace['context_len']} tokens."
        )
    for name, arm in figures["arms"].items():
        told = [f"tokens counted by {key}: {num}" for key, num in arm["count_sources"].items()]
        told += arm["limits"]
        shares = [share for share in arm["page_cache_shares"] if share is not None]
        if shares:
            told.append(
                f"of the model in the page cache before a start: {min(shares):.0%} at least"
            )
        for stage, energy in arm["energy"].items():
            told.append(f"energy of {stage}: {energy['label']}: {energy['explanation']}")
        lines += [f"{name}: {one}" for one in told]
    formulas = {row["figure"]: row["formula"] for row in figures["rows"]}
    parts = [
        works,
        pages.listing(lines),
        pages.details("Formulas of the tables", table(["figure", "formula"], formulas.items())),
    ]
    return pages.Section("What was asked, and how it was counted", parts)


def cell_text(cell: Mapping[str, Any] | None, unit: str, *, is_first: bool) -> str:
    """An arm's figure in a row: its median, and its ratio to the first arm's."""
    if cell is None:
        return "-"
    told = quantity(cell["median"], unit)
    if is_first or cell["ratio"] is None:
        return told
    return f"{told} ({cell['ratio']:.2f}x)"


def text_table(figures: Mapping[str, Any]) -> str:
    """The figures for a terminal: a line for each, a column for each arm, ratios to the first."""
    names, first = list(figures["arms"]), figures["first"]
    heads = names
    if is_wide := any(len(name) > MAX_NAME for name in names):
        heads = [f"[{number}]" for number in range(1, len(names) + 1)]
    lines = [["", "", *heads]]
    for row in figures["rows"]:
        cells = []
        for name in names:
            cells.append(cell_text(row["arms"][name], row["unit"], is_first=name == first))
        lines.append([row["stage"], row["figure"], *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    made = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    if is_wide:
        made += ["", *(f"{head} {name}" for head, name in zip(heads, names, strict=True))]
    for name, arm in figures["arms"].items():
        made += [f"{name} failed ({one['stage']}): {one['reason']}" for one in arm["failed"]]
    made += ["", *(f"- {note}" for note in figures["notes"])] if figures["notes"] else []
    spent = [energy for arm in figures["arms"].values() for energy in arm["energy"].values()]
    if spent:
        made += ["", f"Energy is {spent[0]['label']}: {spent[0]['explanation']}"]
    return "\n".join(made)

"""Figures and page of the kind `import`: our figures of another tool's rows, beside its own.

Pure functions of the header and the records. What the tool computed is shown by its own names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from penstock.measure.metrics import FORMULAS, OF_REQUEST, TITLES, is_supported, summarize
from penstock.measure.records import Header, Record, Request
from penstock.measure.report import page as pages
from penstock.measure.report import plots, tables
from penstock.measure.report.units import number, percent
from penstock.measure.results.flat import flat

_SHOWN = ("ttft_s", "tpot_s", "e2e_s", "e2e_from_due_s", "queue_s")


def figures(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """Figures by arm and stage, and the tool's own. A run without rows has no figures of ours."""
    rows = [record for record in records if isinstance(record, Request)]
    groups: dict[tuple[str, str], list[Request]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.stage), []).append(row)
    timeline = bool(header.settings.get("has_timeline")) and bool(rows)
    made = {
        "format": header.settings.get("format"),
        "num_requests": len(rows),
        "groups": [
            {"arm": arm, "stage": stage, **_group(part, timeline)}
            for (arm, stage), part in groups.items()
        ],
        "source": header.settings.get("source", {}),
        "notes": header.settings.get("notes", []),
    }
    return made, []


def _group(rows: Sequence[Request], timeline: bool) -> dict[str, Any]:
    """Requests of a warm-up count nowhere but here; what was cut is neither good nor bad."""
    counted = [row for row in rows if row.phase == "steady"]
    good = [row for row in counted if row.error_class is None]
    errors = Counter(row.error_class for row in counted if row.error_class is not None)
    made: dict[str, Any] = {
        "num_requests": len(counted),
        "num_not_steady": len(rows) - len(counted),
        "num_ok": len(good),
        "errors": dict(sorted(errors.items())),
    }
    for name, compute in OF_REQUEST.items():
        made[name] = summarize(compute(row) for row in good)
    for name in ("n_in", "n_out"):
        made[name] = summarize(getattr(row, name) for row in good)
    made["output_tokens_per_s"] = _rate(good, timeline)
    made["scores"] = _scores(good)
    return made


def _rate(good: Sequence[Request], timeline: bool) -> float | None:
    """Output tokens of good requests over the time from the first sent to the last done."""
    sent = [row.t_sent_ns for row in good if row.t_sent_ns is not None]
    done = [row.t_done_ns for row in good if row.t_done_ns is not None]
    if not timeline or not sent or not done or max(done) <= min(sent):
        return None
    counts = [row.n_out for row in good]
    if any(count is None for count in counts):
        return None
    return sum(count or 0 for count in counts) / ((max(done) - min(sent)) * 1e-9)


def _scores(rows: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """Means of scores by task; a row without a score does not count here."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, score in row.scores.items():
            values.setdefault(row.task, {}).setdefault(name, []).append(score)
    return {
        task: {
            name: {"n": len(scores), "mean": math.fsum(scores) / len(scores)}
            for name, scores in sorted(by_name.items())
        }
        for task, by_name in sorted(values.items())
    }


def page(header: Header, figures: dict[str, Any], records: Sequence[Record]) -> str:
    """The page of an imported run."""
    rows = [record for record in records if isinstance(record, Request)]
    groups = figures["groups"]
    models = ", ".join(dict.fromkeys(arm.model or arm.name for arm in header.arms))
    sections = []
    if any(group["e2e_s"]["n"] for group in groups):
        sections.append(pages.Section("Latency", [_latency(groups), *_distributions(rows)]))
    if any(group["scores"] for group in groups):
        sections.append(pages.Section("Scores", [_score_table(groups)]))
    names = tables.table(["there", "here"], header.settings.get("names", {}).items())
    told = [pages.listing(figures["notes"])] if figures["notes"] else []
    sections.append(pages.Section("What the names mean", [*told, names]))
    if figures["source"]:
        own = tables.table(["figure", "value"], flat(figures["source"]).items())
        text = "As the tool wrote them, by its own names and in its own units."
        part = pages.Section("The tool's own figures", [text, pages.details("Figures", own)])
        sections.append(part)
    sections.append(pages.provenance(header))
    num_ok = sum(group["num_ok"] for group in groups)
    counted = sum(group["num_requests"] for group in groups)
    cards = [
        ("tool", str(figures["format"]), header.settings.get("source_date", "")),
        ("requests", number(figures["num_requests"]), "" if rows else "the file has no rows"),
        ("answered", percent(num_ok / counted) if counted else "—", ""),
    ]
    return pages.document(f"Imported: {models}", sections, summary=[tables.cards(cards)])


def _latency(groups: Sequence[dict[str, Any]]) -> str:
    columns: list[tables.Column | str] = ["arm", "stage", "figure", tables.Column("n")]
    columns += [tables.Column(name, "s") for name in ("mean", "p50", "p90", "p95", "p99", "max")]
    lines = []
    for group in groups:
        for name in _SHOWN:
            part = group[name]
            if part["n"]:
                marked = [_marked(part, mark) for mark in ("p50", "p90", "p95", "p99")]
                figure = f"{TITLES[name]} ({name})"
                head = [group["arm"], group["stage"], figure, part["n"], part["mean"]]
                lines.append([*head, *marked, part["max"]])
    return tables.table(columns, lines)


def _marked(part: dict[str, Any], mark: str) -> Any:
    if is_supported(part["n"], float(mark[1:]) / 100):
        return part[mark]
    return tables.Marked(part[mark], "fewer than 10 values lie beyond it")


def _distributions(rows: Sequence[Request]) -> list[str]:
    good = [row for row in rows if row.phase == "steady" and row.error_class is None]
    drawn: list[str] = []
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        samples: dict[str, list[float]] = {}
        for row in good:
            value = OF_REQUEST[name](row)
            if value is not None:
                samples.setdefault(f"{row.arm} {row.stage}".strip(), []).append(value)
        if samples:
            axis = plots.Axis(TITLES[name], "s")
            note = f"{name} = {FORMULAS[name]}"
            drawn.append(plots.ecdf(samples, axis, title=TITLES[name].capitalize(), note=note))
    return drawn


def _score_table(groups: Sequence[dict[str, Any]]) -> str:
    lines = [
        [group["arm"], task, name, part["n"], part["mean"]]
        for group in groups
        for task, scores in group["scores"].items()
        for name, part in scores.items()
    ]
    return tables.table(["arm", "task", "score", "n", "mean"], lines)

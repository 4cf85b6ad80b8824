"""From samples to rows, a table and plots.

Owns the statistics. A ratio is above 1 where the engine is better than the best peer, whatever the
unit; it is the median over the rounds in which both were measured, so that drift cancels. Knows
neither how samples were taken nor where results go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import summary
from benchmarks.peers.cells import Cell, Figure
from benchmarks.peers.rounds import Samples

SUBJECT = "penstock"
Row = dict[str, Any]
CELL_KEY = ("model", "precision", "cell")


def ratio(ours: dict[int, float], theirs: dict[int, float], *, more_is_better: bool) -> float:
    """How many times better `ours` is: the median over common rounds, else of the medians."""
    common = ours.keys() & theirs.keys()
    pairs = [(ours[round_], theirs[round_]) for round_ in common]
    pairs = pairs or [(median(ours.values()), median(theirs.values()))]
    return median(a / b if more_is_better else b / a for a, b in pairs)


def best_peer(by_engine: dict[str, dict[int, float]], *, more_is_better: bool) -> str | None:
    """The engine with the best median that is not penstock."""
    medians = {
        engine: median(values.values()) for engine, values in by_engine.items() if engine != SUBJECT
    }
    if not medians:
        return None
    return (max if more_is_better else min)(medians, key=medians.__getitem__)


def rows(
    model: str,
    precision: str,
    cells: dict[str, Cell],
    engines: Sequence[str],
    samples: Samples,
    ceilings: dict[str, float],
) -> list[Row]:
    """One row for each figure and engine: statistics, or the reason why there are none."""
    found = []
    for cell_name, cell in cells.items():
        failed = samples.failures.get("startup", {}) | samples.failures.get(cell_name, {})
        for name, figure in cell.figures.items():
            by_engine = samples.values.get(name, {})
            peer = best_peer(by_engine, more_is_better=figure.more_is_better)
            for engine in engines:
                head = {
                    "model": model,
                    "precision": precision,
                    "cell": cell_name,
                    "figure": name,
                    "unit": figure.unit,
                    "engine": engine,
                }
                if engine in by_engine:
                    row = head | _statistics(by_engine, engine, peer, figure, ceilings.get(name))
                    if engine in failed:  # after some samples
                        row["error"] = failed[engine]
                    found.append(row)
                elif engine in failed:
                    found.append(head | {"error": failed[engine]})
    return found


def _statistics(
    by_engine: dict[str, dict[int, float]],
    engine: str,
    peer: str | None,
    figure: Figure,
    ceiling: float | None,
) -> Row:
    values = by_engine[engine]
    more = figure.more_is_better
    row: Row = summary(list(values.values())) | {"samples": list(values.values())}
    if peer is not None:
        row["best_peer"] = peer
        row["ratio_to_best_peer"] = ratio(values, by_engine[peer], more_is_better=more)
    if ceiling is not None:
        row["ceiling"] = ceiling
        share = row["median"] / ceiling
        row["fraction_of_ceiling"] = share if more else 1 / share
    return row


def merged(run: Row, new: list[Row], earlier: Path | None) -> tuple[list[Row], list[Row]]:
    """The runs and rows of an earlier file with those of this run; a row names its run.

    What this run has measured (model, precision, cell) replaces what was there.
    """
    runs: list[Row] = []
    rows_: list[Row] = []
    if earlier is not None and earlier.exists():
        figures = json.loads(earlier.read_text())["figures"]
        replaced = {tuple(row[name] for name in CELL_KEY) for row in new}
        rows_ = [
            row for row in figures["rows"] if tuple(row[name] for name in CELL_KEY) not in replaced
        ]
        used = {row["run"] for row in rows_}
        runs = [one for one in figures["runs"] if one["time"] in used]
    return [*runs, run], rows_ + [row | {"run": run["time"]} for row in new]


def table(found: Iterable[Row], titles: dict[str, str]) -> str:
    """Markdown: a line for each model and figure, a column for each precision.

    An entry is penstock's median, its ratio to the best peer, and its share of the ceiling; without
    penstock, the best peer's.
    """
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in found:
        key = (row["model"], row["figure"])
        groups.setdefault(key, {}).setdefault(row["precision"], []).append(row)
    precisions = list(dict.fromkeys(name for entry in groups.values() for name in entry))
    lines = [
        "| model | figure | " + " | ".join(precisions) + " |",
        "|---|---|" + "---|" * len(precisions),
    ]
    for (model, figure), entry in groups.items():
        texts = [_entry(entry.get(name, [])) for name in precisions]
        lines.append(f"| {model} | {titles[figure]} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _entry(found: list[Row]) -> str:
    measured = {row["engine"]: row for row in found if "median" in row}
    peer = next((row.get("best_peer") for row in measured.values()), None)
    if SUBJECT in measured:
        ours = measured[SUBJECT]
        text = f"{_short(ours['median'])} {ours['unit']}"
        if "error" in ours:
            text += " (then it failed)"
        if "fraction_of_ceiling" in ours:
            text += f", {ours['fraction_of_ceiling']:.0%} of ceiling"
        if peer is not None:
            text += (
                f"; {ours['ratio_to_best_peer']:.2f}x {peer} ({_short(measured[peer]['median'])})"
            )
        return text
    if peer is not None:
        return f"{peer} {_short(measured[peer]['median'])} {measured[peer]['unit']}"
    return "failed" if found else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(model: str, found: Sequence[Row], titles: dict[str, str], path: Path) -> None:
    """All engines by figure and precision: medians, extremes as whiskers, ceilings as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    measured = [row for row in found if "median" in row]
    figures = list(dict.fromkeys(row["figure"] for row in measured))
    precisions = list(dict.fromkeys(row["precision"] for row in measured))
    engines = list(dict.fromkeys(row["engine"] for row in measured))
    num_columns = 4
    num_lines = -(-len(figures) // num_columns)
    canvas, axes = plt.subplots(
        num_lines, num_columns, figsize=(4.4 * num_columns, 3 * num_lines), squeeze=False
    )
    width = 0.8 / len(engines)
    for axis, figure in zip(axes.flat, figures, strict=False):
        for row in (row for row in measured if row["figure"] == figure):
            number = engines.index(row["engine"])
            left = precisions.index(row["precision"]) - 0.4
            middle = row["median"]
            whiskers = [[middle - row["min"]], [row["max"] - middle]]
            at = left + (number + 0.5) * width
            axis.bar(at, middle, width, yerr=whiskers, color=f"C{number}", ecolor="0.4")
            if "ceiling" in row:
                axis.hlines(row["ceiling"], left, left + 0.8, color="0.3", linewidth=1)
        axis.set_title(titles[figure], fontsize=9)
        axis.set_ylabel(next(row["unit"] for row in measured if row["figure"] == figure))
        axis.set_xticks(range(len(precisions)), precisions)
    for axis in list(axes.flat)[len(figures) :]:
        axis.set_axis_off()
    handles = [Patch(color=f"C{number}") for number in range(len(engines))]
    canvas.legend(handles, engines, loc="lower right", ncols=len(engines))
    canvas.suptitle(f"{model}; line: measured ceiling")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)

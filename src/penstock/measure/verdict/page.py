"""One page of a comparison: a sentence and four tiles for who decides, the rest for who checks.

Pure: of the header, the figures as JSON has them, and the records for the distributions alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.measure.records import Header, Mark, Record
from penstock.measure.report import page as report
from penstock.measure.report import plots, tables, units
from penstock.measure.report.axes import Axis
from penstock.measure.report.html import Html, element
from penstock.measure.report.page import Section
from penstock.measure.report.tables import Absent, Column
from penstock.measure.verdict import figures as comparison
from penstock.measure.verdict import rule, words
from penstock.measure.verdict.page_load import resources_section, speed_sections

MOST_TEXT = 600  # characters of an answer in the table of flips
SIGNS = {"better": "▲", "not worse": "=", "worse": "▼", "cannot tell": "?"}


def page(header: Header, figures: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The whole page."""
    overall = figures["overall"]
    sections = [
        _verdict(figures),
        *_quality(figures.get("quality")),
        *speed_sections(figures.get("speed"), header, records),
        resources_section(figures, header),
        *_divergence(figures.get("divergence")),
        _trust(figures, records),
        report.provenance(header),
    ]
    base, variant = (arm["name"] for arm in figures["arms"])
    verdict = overall["verdict"]
    return report.document(
        f"{variant} against {base}",
        sections,
        summary=[
            element("p", element("strong", f"{SIGNS[verdict]} {verdict}. "), overall["sentence"]),
            _tiles(figures),
            *(element("p", note) for note in figures["notes"]),
        ],
        problems=comparison.Comparison(header, records).problems(),
    )


# --- at the top ----------------------------------------------------------------------------------


def _tiles(figures: Mapping[str, Any]) -> Html:
    axes = figures["axes"]
    tiles = [_tile("Quality", axes.get("quality")), _tile("Speed", axes.get("speed"))]
    tiles.append(_tile("Memory", axes.get("memory")))
    energy, cost = axes.get("energy"), axes.get("cost")
    value = " · ".join(
        f"{name} {_effect(axis)}" for name, axis in (("energy", energy), ("cost", cost)) if axis
    )
    told = [
        f"{name}: {axis['verdict']}" for name, axis in (("energy", energy), ("cost", cost)) if axis
    ]
    if energy:
        told.append(f"energy {figures['energy']['label']}")
    tiles.append(("Energy and cost", value or units.ABSENT, "; ".join(told) or "not measured"))
    return tables.cards(tiles)


def _tile(title: str, axis: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if axis is None:
        return title, units.ABSENT, "not measured"
    between = _between(axis)
    told = f"{SIGNS[axis['verdict']]} {axis['verdict']}"
    parts = (told, between and f"interval {between}", _missing(axis), axis.get("note"))
    return title, _effect(axis), "; ".join(part for part in parts if part)


def _effect(axis: Mapping[str, Any]) -> str:
    return words.effect(msgspec.convert(axis, rule.Axis)) or units.ABSENT


def _between(axis: Mapping[str, Any]) -> str:
    return words.between(msgspec.convert(axis, rule.Axis))


def _missing(axis: Mapping[str, Any]) -> str:
    return words.missing(msgspec.convert(axis, rule.Axis))


def _verdict(figures: Mapping[str, Any]) -> Section:
    rows = []
    for axis in figures["axes"].values():
        bound = axis.get("bound")
        rows.append(
            [
                axis["name"],
                f"{SIGNS[axis['verdict']]} {axis['verdict']}",
                _effect(axis),
                _between(axis) or Absent(axis.get("note") or "no interval"),
                Absent("no bound") if bound is None else _scaled(axis, bound),
                f"{axis['margin']:g} {'points' if axis['kind'] == 'difference' else '%'}",
                Absent("no noise floor")
                if axis.get("floor") is None
                else f"{axis['floor']:.2f} {'points' if axis['kind'] == 'difference' else '%'}",
                axis.get("p"),
            ]
        )
    level = next(
        (axis["confidence"] for axis in figures["axes"].values() if axis["confidence"]), 0.95
    )
    table = tables.table(
        [
            "axis",
            "verdict",
            Column("effect", help="B - A in points, or B/A"),
            Column(f"{100 * level:.4g} % interval"),
            Column("bound", help="one-sided, on the side of a loss"),
            "margin",
            Column("noise floor", help="what the base shows against itself"),
            Column("p", help="two-sided"),
        ],
        rows,
    )
    return Section(
        "The verdict",
        [
            table,
            report.listing([_about(axis) for axis in figures["axes"].values()]),
            *_forests(figures, level),
            report.details(
                "The rule, as it was set before the run", report.listing(figures["rule"])
            ),
        ],
    )


def _about(axis: Mapping[str, Any]) -> str:
    """What an axis is measured by, and what to know of it."""
    told = f"{axis['name']}: {axis['metric']}"
    return "; ".join(one for one in (told, _missing(axis), axis.get("note")) if one)


def _scaled(axis: Mapping[str, Any], value: float) -> str:
    if axis["kind"] == "difference":
        return f"{value:+.2f}".replace("-", "−")
    return f"×{value:.3g}"


def _forests(figures: Mapping[str, Any], level: float) -> list[Html]:
    ratios = [
        plots.Effect(axis["name"], axis["estimate"], axis["low"], axis["high"], axis["verdict"])
        for axis in figures["axes"].values()
        if axis["kind"] == "ratio" and axis["estimate"] is not None
    ]
    if not ratios:
        return []
    return [
        plots.forest(
            ratios,
            Axis("B / A", "", log=True),
            title="Ratios of the variant to the base",
            note="Speed: above 1 is faster. Memory, energy, cost: below 1 is less.",
            reference=1.0,
            interval_name=f"{100 * level:.4g} % confidence interval",
        )
    ]


# --- quality -------------------------------------------------------------------------------------


def _quality(quality: Mapping[str, Any] | None) -> list[Section]:
    if quality is None:
        return []
    pooled = quality["pooled"]
    parts: list[str] = [
        f"{pooled['n']:,} items in {pooled['num_clusters']:,} clusters: the base scores "
        f"{units.percent(pooled['a'])}, the variant {units.percent(pooled['b'])}. "
        f"{pooled['num_lost']} answers became worse and {pooled['num_won']} better "
        f"(exact McNemar p = {pooled['mcnemar_p']:.3g}). Tested by: {pooled['method']}.",
        tables.table(
            [
                "interval of the difference",
                Column("difference", "points"),
                Column("low", "points"),
                Column("high", "points"),
                Column("level", "%"),
                "units",
            ],
            [
                [
                    one["method"],
                    one["estimate"],
                    one["low"],
                    one["high"],
                    one["confidence"],
                    one["num_units"],
                ]
                for one in pooled["intervals"]
            ],
        ),
        _tasks(quality["tasks"]),
        plots.forest(
            [
                plots.Effect(row["task"], row["difference"], row["low"], row["high"])
                for row in quality["tasks"]
            ],
            Axis("variant - base", "points"),
            title="Difference of the main score by task",
        ),
        *quality["notes"],
        _repeat(quality.get("repeat")),
    ]
    for arm, errors in pooled["errors"].items():
        if errors:
            told = ", ".join(f"{name} {count}" for name, count in errors.items())
            parts.append(f"Errors of {arm.upper()}, counted as wrong answers: {told}.")
    return [Section("Quality", parts), Section("Flips", _flips(quality["flips"], pooled))]


def _tasks(rows: Sequence[Mapping[str, Any]]) -> Html:
    return tables.table(
        [
            "task",
            "n",
            Column("base", "%"),
            Column("variant", "%"),
            Column("difference", "points"),
            Column("low", "points"),
            Column("high", "points"),
            "lost",
            "won",
            Column("p"),
            Column("p (Holm)", help="adjusted for the number of tasks"),
        ],
        [
            [
                row["task"],
                row["n"],
                row["a"],
                row["b"],
                row["difference"],
                row["low"],
                row["high"],
                row["num_lost"],
                row["num_won"],
                row["p"],
                row["p_holm"],
            ]
            for row in rows
        ],
        caption="By task, each with its own 95 % interval",
    )


def _repeat(repeat: Mapping[str, Any] | None) -> str:
    if repeat is None:
        return "The base was not asked again: its own nondeterminism is not known."
    told = (
        f"The base against itself, at temperature 0: {repeat['num_flips']} of {repeat['n']:,} "
        f"scores flipped, {repeat['num_other_texts']:,} texts differ"
    )
    if "share_of_flips_at_most" in repeat:
        told += f" (none: at most {units.percent(repeat['share_of_flips_at_most'])}, 95 %)"
    return told + "."


def _flips(flips: Sequence[Mapping[str, Any]], pooled: Mapping[str, Any]) -> list[str]:
    if not flips:
        return ["No score differs."]
    total = pooled["num_lost"] + pooled["num_won"]
    rows = [
        [
            f"{row['task']}: {row['prompt_id']}",
            _shown(row.get("question")),
            f"{'lost' if row['b'] < row['a'] else 'won'}: {row['a']:g} → {row['b']:g}",
            _answer(row, "a"),
            _answer(row, "b"),
        ]
        for row in flips
    ]
    head = ["item", "question", "score", "answer of the base", "answer of the variant"]
    return [f"{len(flips)} of {total} are listed, losses first.", tables.table(head, rows)]


def _answer(row: Mapping[str, Any], arm: str) -> Any:
    if row[f"error_{arm}"]:
        return f"error: {row[f'error_{arm}']}"
    return _shown(row[f"output_{arm}"] or "")


def _shown(text: str | None) -> Any:
    if text is None:
        return Absent("not kept")
    return report.code(text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + " …")


# --- the rest ------------------------------------------------------------------------------------


def _divergence(found: Mapping[str, Any] | None) -> list[Section]:
    if found is None:
        return []
    kl, top1, ratio = found["mean_kl"], found["top1"], found["ln_ppl_ratio"]

    def told(interval: Mapping[str, Any], scale: float = 1.0) -> list[Any]:
        values = (interval["estimate"], interval["low"], interval["high"])
        return [scale * value if value is not None else None for value in values]

    rows = [
        ["mean KL divergence of the base from the variant, nats", *told(kl)],
        ["same most likely token, %", *told(top1, 100)],
        ["mean ln(PPL variant / PPL base)", *told(ratio)],
        ["change of the true token's probability, points", *told(found["probability_change"])],
    ]
    quantiles = ", ".join(f"{name} {value:.3g}" for name, value in found["kl_quantiles"].items())
    return [
        Section(
            "Divergence",
            [
                f"{found['num_tokens']:,} tokens of {found['num_windows']:,} answers of the base, "
                "token by token: what each precision says comes next. Uncertainty by answer.",
                tables.table(["", "mean", "95 % low", "95 % high"], rows),
                f"KL divergence of single tokens: {quantiles}. Perplexity: base "
                f"{found['ppl_a']:.4g}, variant {found['ppl_b']:.4g}.",
            ],
        )
    ]


def _trust(figures: Mapping[str, Any], records: Sequence[Record]) -> Section:
    rows = [
        [
            row["arm"],
            row["stage"],
            row["n"],
            ", ".join(f"{name} {count}" for name, count in row["errors"].items()) or "none",
        ]
        for row in figures["failures"]
    ]
    limits = [
        f"{record.arm}: {record.facts['message']}"
        for record in records
        if isinstance(record, Mark) and record.name == "limit"
    ]
    parts: list[str] = [tables.table(["arm", "part", "requests", "errors"], rows)]
    if limits:
        parts += ["What the arms cannot do of what was asked:", report.listing(limits)]
    return Section("Requests and errors", parts)

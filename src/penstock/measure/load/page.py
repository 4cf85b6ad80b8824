"""The page of a load: what it came to, how waits are spread, what went on over time.

Pure: header, figures and records in, one HTML document out. All numbers are those of the figures;
only distributions are drawn from the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from penstock.measure import metrics
from penstock.measure.load import notes
from penstock.measure.load.figures import FORMULAS
from penstock.measure.records import Header, Record, Request
from penstock.measure.report import page as pages
from penstock.measure.report import plots
from penstock.measure.report.page import Section
from penstock.measure.report.tables import Absent, Column, Marked, cards, table
from penstock.measure.report.units import quantity

_MOST_TIMELINES = 8  # stages drawn over time; the others are in the table
_LATENCIES = (
    "ttft_from_due_s",
    "ttft_s",
    "ttft_visible_s",
    "tpot_s",
    "e2e_from_due_s",
    "e2e_s",
    "queue_s",
    "chunk_gap_s",
)
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_PER_S = "requests/s"
_TOKENS_PER_S = "tokens/s"

_HEADLINE: list[Column | str] = [
    "stage",
    Column("asked for", _PER_S, "the rate that was asked for"),
    Column("scheduled", _PER_S, "requests due in the steady window, by its length"),
    Column("sent", _PER_S),
    Column("answered", _PER_S, "answers that ended in the steady window, by its length"),
    Column("requests"),
    Column("failed"),
    Column("cut", help="the run ended before they did: neither good nor bad"),
    Column("in flight", help="mean over the window"),
    Column("output", _TOKENS_PER_S, "tokens by the time of their chunk"),
    Column("in and out", _TOKENS_PER_S, "prompts count when their first token comes"),
    Column("cached", "%", "share of prompt tokens that the server had in its cache"),
    Column("good", "%", "share of requests within every limit of their own"),
    Column("good a second", _PER_S),
]


def page(header: Header, figures: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The page of a run of the kind `bench`."""
    stages: list[Mapping[str, Any]] = figures["stages"]
    rows = [one for one in records if isinstance(one, Request) and one.phase == "steady"]
    title = f"Load on {', '.join(arm.name for arm in header.arms) or 'a server'}"
    sections = [_headline(stages), _latencies(stages, rows)]
    if len(stages) > 1:
        sections.append(_over_load(stages, figures))
    sections.append(_over_time(stages))
    sections.append(_failures(stages))
    if any(stage["meters"]["memory"]["num_samples"] or _energy(stage) for stage in stages):
        sections.append(_meters(stages))
    sections.append(Section("What the rates are", [table(["name", "formula"], FORMULAS.items())]))
    sections.append(pages.provenance(header))
    return pages.document(
        title,
        sections,
        summary=_summary(stages, figures),
        problems=figures["problems"],
    )


def _summary(stages: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    if figures["search"]:
        parts.append(notes.answer(figures["search"]))
    if len(stages) == 1:
        parts.append(cards(_cards(stages[0])))
    if figures["notes"]:
        parts.append(pages.listing(figures["notes"]))
    return parts


def _cards(stage: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    requests, rate, latency = stage["requests"], stage["rate"], stage["latency"]
    share = stage["goodput"] and stage["goodput"]["share"]
    found = [
        ("answered", f"{requests['num_ok']:,} of {requests['num']:,}", "requests"),
        ("rate", quantity(rate["answered_per_s"], _PER_S), "answered in the steady window"),
        ("output", quantity(stage["tokens"]["output_per_s"], _TOKENS_PER_S), ""),
        ("first token", quantity(latency["ttft_from_due_s"]["p50"], "s"), "median, from due"),
        ("token", quantity(latency["tpot_s"]["p50"], "s"), "median tpot_s"),
        ("answer", quantity(latency["e2e_from_due_s"]["p50"], "s"), "median, from due"),
    ]
    if share is not None:
        found.append(("good", quantity(share, "%"), ", ".join(stage["goodput"]["limits"])))
    return found


def _headline(stages: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for stage in stages:
        rate, requests, tokens = stage["rate"], stage["requests"], stage["tokens"]
        goodput = stage["goodput"] or {"share": _NO_LIMITS, "per_s": _NO_LIMITS}
        rows.append(
            [
                stage["stage"] or "load",
                rate["requested_per_s"] or Absent("a closed loop or a schedule has no rate"),
                rate["scheduled_per_s"] or Absent("a closed loop has no schedule"),
                rate["achieved_per_s"],
                rate["answered_per_s"],
                requests["num"],
                requests["num_errors"],
                requests["num_cut"],
                stage["in_flight"]["mean"],
                tokens["output_per_s"],
                tokens["total_per_s"],
                _or(tokens["cached_share"], "the server does not say"),
                goodput["share"],
                goodput["per_s"],
            ]
        )
    parts: list[str] = [table(_HEADLINE, rows)]
    judged = [
        [
            stage["stage"] or "load",
            one["limit"],
            _or(one["value"], "for ever, or nothing known"),
            one["n"],
            notes.outcome(one),
        ]
        for stage in stages
        for one in stage["slo"]
    ]
    if judged:
        parts.append(table(["stage", "limit", "came to", "n", "limit is"], judged))
    return Section("What it came to", parts)


_NO_LIMITS = Absent("no limits of single requests were given (--goodput, --slo)")


def _or(value: Any, reason: str) -> Any:
    return Absent(reason) if value is None else value


def _latencies(stages: Sequence[Mapping[str, Any]], rows: Sequence[Request]) -> Section:
    columns: list[Column | str] = [
        "",
        "figure",
        "n",
        *(Column(name, "s") for name in ("mean", *_QUANTILES, "max")),
    ]
    lines = []
    for stage in stages:
        for name in _LATENCIES:
            made = stage["latency"][name]
            cells = [_quantile(made, mark, q) for mark, q in _QUANTILES.items()]
            if made["n"]:
                lines.append(
                    [
                        stage["stage"] or "load",
                        f"{metrics.TITLES[name]} ({name})",
                        *(made["n"], made["mean"], *cells, made["max"]),
                    ]
                )
    parts: list[str] = [
        table(columns, lines, caption="Times of answered requests that were due in the window."),
        "A value marked with * has fewer than 10 requests beyond it. Formulas are at the end.",
    ]
    for name, told in (
        ("ttft_from_due_s", "Time to the first token, from due"),
        ("tpot_s", "Time of an output token after the first chunk"),
        ("e2e_from_due_s", "Time to the whole answer, from due"),
    ):
        figure = metrics.OF_REQUEST[name]
        spread = {
            stage["stage"] or "load": _known(
                figure(row)
                for row in rows
                if row.ok and (row.arm, row.stage) == (stage["arm"], stage["stage"])
            )
            for stage in stages
        }
        parts.append(plots.ecdf(spread, plots.Axis(name, "s"), title=told))
    return Section("Latency", parts)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _quantile(made: Mapping[str, Any], name: str, q: float) -> Any:
    weak = not metrics.is_supported(made["n"], q)
    return Marked(made[name], "fewer than 10 requests lie beyond it") if weak else made[name]


def _over_load(stages: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> Section:
    done = [stage for stage in stages if stage["tokens"]["output_per_s"]]
    done.sort(key=lambda stage: stage["tokens"]["output_per_s"])
    parts: list[str] = []
    for name in ("ttft_from_due_s", "tpot_s"):
        lines = [
            plots.Series(
                mark,
                [(stage["tokens"]["output_per_s"], stage["latency"][name][mark]) for stage in done],
            )
            for mark in ("p50", "p95")
        ]
        parts.append(
            plots.line(
                lines,
                plots.Axis("output", _TOKENS_PER_S),
                plots.Axis(name, "s"),
                title=f"{name} against throughput",
                note="One mark for each stage.",
            )
        )
    points = [
        plots.Point(point["user_per_s"], point["system_per_s"], point["label"])
        for point in figures["pareto"]
    ]
    parts.append(
        plots.scatter(
            points,
            plots.Axis("one user", _TOKENS_PER_S, low=0.0),
            plots.Axis("all users", _TOKENS_PER_S, low=0.0),
            title="Speed of one user against throughput of all",
            note="One user: 1 / p90 of tpot_s. The steps join measured points that no other beats "
            "in both; nothing is interpolated.",
            better=("high", "high"),
        )
    )
    if figures["search"]:
        tried = [
            [one["rate"], "kept" if one["passed"] else f"broken: {one.get('why', '')}"]
            for one in figures["search"]["tried"]
        ]
        parts.append(table([Column("rate", _PER_S), "limits"], tried, caption="The search."))
    return Section("Over loads", parts)


def _over_time(stages: Sequence[Mapping[str, Any]]) -> Section:
    parts: list[str] = []
    for stage in stages[:_MOST_TIMELINES]:
        lines = stage["lines"]
        if not lines:
            continue
        marks = [(lines["steady_begin_s"], "steady"), (lines["steady_end_s"], "drain")]
        for title, unit, names in (
            ("Requests", _PER_S, {"due": "due_per_s", "answered": "answered_per_s"}),
            ("Requests in flight", "", {"in flight": "in_flight"}),
            ("Output tokens", _TOKENS_PER_S, {"tokens": "output_tokens_per_s"}),
            (
                "First token, by due time",
                "s",
                {"median": "ttft_from_due_p50_s", "longest": "ttft_from_due_max_s"},
            ),
        ):
            series = [
                plots.Series(name, list(zip(lines["t_s"], lines[field], strict=True)))
                for name, field in names.items()
            ]
            told = f"{title} ({stage['stage']})" if len(stages) > 1 else title
            axis = plots.Axis(title.lower(), unit, low=0.0)
            parts.append(plots.timeline(series, axis, title=told, marks=marks))
    if len(stages) > _MOST_TIMELINES:
        parts.append(f"Of {len(stages)} stages, the first {_MOST_TIMELINES} are drawn.")
    return Section("Over time", parts)


def _failures(stages: Sequence[Mapping[str, Any]]) -> Section:
    lines = []
    for stage in stages:
        for name, num in stage["requests"]["errors"].items():
            example = stage["requests"]["error_examples"][name]
            lines.append([stage["stage"] or "load", name, num, example])
    counts = [
        [
            stage["stage"] or "load",
            *(stage["requests"][f"num_{name}"] for name in ("truncated", "retried", "cut")),
            stage["requests"]["num_outside"],
        ]
        for stage in stages
    ]
    heads = ["stage", "ended by length", "retried", "cut by the end", "outside the window"]
    parts: list[str] = [table(heads, counts)]
    if lines:
        parts.insert(0, table(["stage", "error", "requests", "the first one"], lines))
    else:
        parts.insert(0, "No request failed.")
    return Section("Failures", parts)


def _energy(stage: Mapping[str, Any]) -> bool:
    return stage["meters"]["energy"]["joules_gross"] is not None


def _meters(stages: Sequence[Mapping[str, Any]]) -> Section:
    columns: list[Column | str] = [
        "stage",
        Column("peak RSS", "bytes", "highest sum over the process tree"),
        Column("CPU", "s"),
        Column("energy", "J"),
        Column("per output token", "J"),
        "energy is",
        Column("CO2", "g"),
        Column("machine", "usd"),
        Column("tokens bought", "usd"),
        Column("bought, per answer", "usd"),
    ]
    lines = []
    for stage in stages:
        made = stage["meters"]
        memory, energy, cost = made["memory"], made["energy"], stage["cost"]
        bought = Absent("no request has a price (--prices, --provider)")
        lines.append(
            [
                stage["stage"] or "load",
                _or(memory["peak_rss_bytes"], memory["why_none"] or "not read"),
                _or(memory["cpu_s"], memory["why_none"] or "not read"),
                _or(energy["joules_gross"], energy["explanation"]),
                _or(energy["joules_per_output_token"], energy["explanation"]),
                energy["label"],
                _or(made["carbon"]["grams"], made["carbon"]["explanation"]),
                _or(made["machine_cost"]["usd"], made["machine_cost"]["explanation"]),
                cost["usd"] if cost["num_unknown"] < cost["num_requests"] else bought,
                _or(cost["usd_per_success"], "not every request has a known cost"),
            ]
        )
    told = list(dict.fromkeys(stage["meters"]["energy"]["explanation"] for stage in stages))
    return Section("Memory, energy, money", [table(columns, lines), *told])

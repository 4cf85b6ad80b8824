"""The figures of a load: pure functions of rows, marks and samples, one set for each stage.

Latencies are of requests that were due in the steady window, from their due time and from their
sending; rates are of what happened within it. What a reader must know of a figure is a note; what
makes the run worthless is a problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.measure import metrics
from penstock.measure.load import notes, slo
from penstock.measure.load.timeline import (
    NUM_BINS,
    Window,
    edges_of,
    in_flight,
    input_in,
    known_out,
    means_in_flight,
    output_in,
    output_tokens,
    trend,
)
from penstock.measure.meters.figures import meter_figures, token_cost
from penstock.measure.records import Header, Mark, Record, Request, Sample

FORMULAS = {
    "window": "requests due from the end of the ramp to the end of the load; its length is exact",
    "scheduled_per_s": "requests due in the window / its length",
    "achieved_per_s": "of these, requests sent, or tried to send to a server that was not there / "
    "(the window, or until the last was sent if later)",
    "answered_per_s": "whole answers that ended in the window, of all requests / its length",
    "output_per_s": "output tokens whose chunk came in the window / its length, of all requests",
    "input_per_s": "prompt tokens of requests whose first token came in the window / its length",
    "cached_share": "n_cached / n_in, summed over answers whose server tells both",
    "goodput": "requests of the window within every limit of their own / its length; failures are "
    "not good, requests that the end of the run cut are left out",
    "user_per_s": "1 / p90 of tpot_s",
    "saturated": "requests in flight and waits for the first token, as means of 12 parts of the "
    "window, both rise (one-sided t test of the slope, p < 0.01) by more than their mean; or the "
    "first do, and the end of the run cut a tenth of the requests before their first token",
}
_LINE_BINS, _LINE_BIN_S = 60, 0.5  # of the lines over time: at most so many, at least so long


def figures(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """Figures and problems of a run of the kind `bench`."""
    rows = [record for record in records if isinstance(record, Request)]
    marks = [record for record in records if isinstance(record, Mark)]
    limits = msgspec.convert(header.settings.get("slo", []), list[slo.Limit])
    stages = [
        load_figures(
            [row for row in rows if (row.arm, row.stage) == key and row.phase != "warmup"],
            [mark for mark in marks if (mark.arm, mark.stage) == key],
            meters=[record for record in records if not isinstance(record, Request)],
            limits=limits,
            settings=header.settings,
        )
        for key in dict.fromkeys((mark.arm, mark.stage) for mark in marks if mark.stage)
        if key[1] != "warmup"
    ]
    warm = [row for row in rows if row.phase == "warmup"]
    made: dict[str, Any] = {
        "stages": stages,
        "warmup": {"num": len(warm), "num_ok": sum(row.ok for row in warm)},
        "pareto": _pareto(stages),
        "search": next((mark.facts for mark in marks if mark.name == "search"), None),
        "notes": notes.of_run(header, marks, stages),
    }
    made["problems"] = [
        *notes.unfinished(header, marks, stages),
        *notes.named(stages, made["search"]),
    ]
    return made, made["problems"]


def load_figures(
    rows: Sequence[Request],
    marks: Sequence[Mark],
    *,
    meters: Sequence[Record] = (),
    limits: Sequence[slo.Limit] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures of one stage of one arm; warm-up not among its rows.

    Args:
        rows: of the stage.
        marks: of the stage, as the driver wrote them; without them, the window is all there is.
        meters: samples and marks of the whole run; those of other times and arms are ignored.
        settings: of the header: prices of machines, power, carbon.
    """
    facts, window, complete = _frame(rows, marks)
    steady = [row for row in rows if row.phase == "steady"]
    answered = [row for row in steady if row.ok]
    wide = _wide_enough(window, answered, rows)
    first: Request | Mark | None = rows[0] if rows else marks[0] if marks else None
    made: dict[str, Any] = {
        "stage": first.stage if first else "",
        "arm": first.arm if first else "",
        "loop": facts.get("loop", "unknown"),
        "load": {name: facts[name] for name in ("rate", "concurrency") if name in facts},
    }
    made |= {
        "window": {"begin_s": window.begin_ns / 1e9, "duration_s": window.duration_s},
        "throughput_window": "steady" if wide == window else "whole stage",
        "requests": _requests(rows, steady),
        "rate": _rates(rows, steady, window, wide, facts),
        "latency": _latencies(answered),
        "tokens": _tokens(rows, answered, wide),
        "goodput": _goodput(steady, limits, window if window.duration_s else wide),
        "slo": slo.judge(steady, limits),
        "in_flight": _in_flight(rows, wide),
        "trends": _trends(rows, steady, window),
        "client": _client(meters, made["arm"], window.begin_ns, marks),
        "lines": _lines(rows, window if window.duration_s else wide),
    }
    made["cost"] = token_cost(steady)
    made["meters"] = _metered(made["arm"], rows, wide, meters, settings or {})
    made["notes"] = notes.of_stage(made, steady, facts, settings or {})
    made["problems"] = notes.problems(made, steady, complete)
    return made


def _latencies(answered: Sequence[Request]) -> dict[str, dict[str, float | int | None]]:
    made = {
        name: metrics.summarize(figure(row) for row in answered)
        for name, figure in metrics.OF_REQUEST.items()
    }
    gaps = (gap for row in answered for gap in metrics.chunk_gaps_s(row))
    return made | {"chunk_gap_s": metrics.summarize(gaps)}


def _metered(
    arm: str,
    rows: Sequence[Request],
    window: Window,
    meters: Sequence[Record],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Memory, energy, carbon and the machine's price of the window of throughput."""
    return meter_figures(
        meters,
        dict(settings),
        arm=arm,
        begin_ns=window.begin_ns,
        end_ns=window.end_ns,
        num_output_tokens=round(output_in(rows, window)),
        num_success=sum(window.holds(row.t_done_ns) for row in rows if row.ok),
    )


def _frame(
    rows: Sequence[Request], marks: Sequence[Mark]
) -> tuple[Mapping[str, Any], Window, bool]:
    """Facts of the stage, its steady window, and whether it came to its end."""
    found = {mark.name: mark for mark in marks}
    times = [
        at_ns for row in rows for at_ns in (row.t_due_ns, row.t_sent_ns, row.t_done_ns) if at_ns
    ]
    begin = found.get("steady_begin")
    end = found.get("steady_end")
    begin_ns = begin.t_ns if begin else min(times, default=0)
    end_ns = end.t_ns if end else max(times, default=begin_ns)
    facts = found["stage_begin"].facts if "stage_begin" in found else {}
    last = found.get("stage_end")
    complete = not marks or (last is not None and not last.facts.get("interrupted"))
    return facts, Window(begin_ns, max(begin_ns, end_ns)), complete


def _wide_enough(window: Window, answered: Sequence[Request], rows: Sequence[Request]) -> Window:
    """The window for throughput: all of the stage where the steady one is shorter than an answer.

    So it is when all requests of a short closed loop are sent at once.
    """
    typical_s = metrics.summarize(map(metrics.e2e_s, answered))["p50"]
    begin_ns = min((row.t_sent_ns for row in rows if row.t_sent_ns is not None), default=0)
    end_ns = max((row.t_done_ns for row in rows if row.t_done_ns is not None), default=0)
    if typical_s is None or window.duration_s >= typical_s or end_ns <= begin_ns:
        return window
    return Window(begin_ns, end_ns + 1)


def _requests(rows: Sequence[Request], steady: Sequence[Request]) -> dict[str, Any]:
    errors = Counter(row.error_class for row in steady if row.error_class not in (None, "cut"))
    return {
        "num": len(steady),
        "num_ok": sum(row.ok for row in steady),
        "num_errors": errors.total(),
        "errors": dict(sorted(errors.items(), key=lambda item: (-item[1], str(item[0])))),
        "error_examples": {
            str(name): next(row.error or "" for row in steady if row.error_class == name)
            for name in errors
        },
        "num_cut": sum(row.error_class == "cut" for row in steady),
        "num_truncated": sum(row.finish_reason == "length" for row in steady if row.ok),
        "num_retried": sum(row.retries > 0 for row in steady),
        "num_prompts": len({row.prompt_hash or row.prompt_id for row in steady}),
        "num_outside": len(rows) - len(steady),
    }


def _rates(
    rows: Sequence[Request],
    steady: Sequence[Request],
    window: Window,
    wide: Window,
    facts: Mapping[str, Any],
) -> dict[str, float | None]:
    """Requests a second: asked for, due by the schedule, sent, and answered, as tokens are counted.

    Sending that takes longer than the schedule makes the achieved rate smaller, also where it ends
    after the window; one that is merely a moment late does not. All at once is no rate.
    """
    sent = [at_ns for at_ns in map(_tried_ns, steady) if at_ns is not None]
    spread_s = max(window.duration_s, (max(sent, default=0) - window.begin_ns) / 1e9)
    done = sum(wide.holds(row.t_done_ns) for row in rows if row.ok)
    at_once = len(steady) > 1 and len({row.t_due_ns for row in steady}) == 1
    open_loop = facts.get("loop") == "open" and window.duration_s > 0 and not at_once
    return {
        "requested_per_s": facts.get("rate"),
        "scheduled_per_s": len(steady) / window.duration_s if open_loop else None,
        "achieved_per_s": len(sent) / spread_s if spread_s else None,
        "answered_per_s": done / wide.duration_s if wide.duration_s else None,
    }


def _tried_ns(row: Request) -> int | None:
    """When it was sent, or would have been if the server had let itself be connected to."""
    if row.t_sent_ns is None and row.error_class in ("connect", "timeout"):
        return row.t_due_ns
    return row.t_sent_ns


def _tokens(rows: Sequence[Request], answered: Sequence[Request], window: Window) -> dict[str, Any]:
    num_in, num_out = input_in(rows, window), output_in(rows, window)
    known = [row for row in answered if row.n_in is not None and row.n_cached is not None]
    prompt_tokens = sum(row.n_in or 0 for row in known)
    cached = sum(row.n_cached or 0 for row in known)
    per_s = 1 / window.duration_s if window.duration_s else None
    unknown = sum(row.count_source in ("chunks", "none") for row in answered)
    return {
        "input_per_s": per_s and num_in * per_s,
        "output_per_s": per_s and num_out * per_s,
        "total_per_s": per_s and (num_in + num_out) * per_s,
        "input": metrics.summarize(row.n_in for row in answered),
        "output": metrics.summarize(map(known_out, answered)),
        "num_reasoning": sum(row.n_reasoning or 0 for row in answered),
        "cached_share": cached / prompt_tokens if prompt_tokens else None,
        "sources": dict(sorted(Counter(row.count_source for row in answered).items())),
        "num_unknown": unknown,
        "num_spread": sum(
            len(row.chunk_t_ns) > 1 and len(row.chunk_n) != len(row.chunk_t_ns) for row in answered
        ),
    }


def _goodput(
    steady: Sequence[Request], limits: Sequence[slo.Limit], window: Window
) -> dict[str, Any] | None:
    own = slo.per_request(limits)
    if not own:
        return None
    good = Counter(slo.is_good(row, own) for row in steady)
    judged = good[True] + good[False]
    return {
        "limits": [str(limit) for limit in own],
        "num_good": good[True],
        "num_bad": good[False],
        "num_unknown": good[None],
        "share": good[True] / judged if judged else None,
        "per_s": good[True] / window.duration_s if window.duration_s else None,
    }


def _in_flight(rows: Sequence[Request], window: Window) -> dict[str, float | None]:
    if not window.duration_s:
        return {"mean": None, "max": None}
    steps = in_flight(rows)
    inside = [number for at_ns, number in steps if window.holds(at_ns)]
    before = [number for at_ns, number in steps if at_ns < window.begin_ns]
    mean = means_in_flight(steps, [window.begin_ns, window.end_ns])[0]
    return {"mean": mean, "max": max([*inside, *before[-1:]], default=0)}


def _trends(rows: Sequence[Request], steady: Sequence[Request], window: Window) -> dict[str, Any]:
    """Whether requests in flight and the wait for the first token both grow: saturation.

    The stop rule of GuideLLM (over-saturation detection), on means of bins of the window.
    """
    edges = edges_of(window, NUM_BINS)
    flying = trend(means_in_flight(in_flight(rows), edges)) if window.duration_s else None
    waits: list[list[float]] = [[] for _ in range(NUM_BINS)]
    for row in steady:
        wait_s = metrics.ttft_from_due_s(row)
        if wait_s is not None and row.t_due_ns is not None and window.holds(row.t_due_ns):
            place = (row.t_due_ns - window.begin_ns) * NUM_BINS
            waits[place // (window.end_ns - window.begin_ns)].append(wait_s)
    waiting = trend([sum(some) / len(some) if some else None for some in waits])
    # Far beyond capacity hardly a wait is known: who came late was never served.
    num_cut = sum(row.error_class == "cut" and row.t_first_ns is None for row in steady)
    return {
        "in_flight": flying and flying._asdict(),
        "ttft": waiting and waiting._asdict(),
        "saturated": bool(
            flying and flying.rises and (num_cut >= len(steady) / 10 or (waiting and waiting.rises))
        ),
    }


def _client(
    records: Iterable[Record], arm: str, begin_ns: int, marks: Sequence[Mark]
) -> dict[str, float | None]:
    """The client at its worst from the begin of the window to the last answer, drain included."""
    end_ns = max((mark.t_ns for mark in marks if mark.name == "stage_end"), default=math.inf)
    own = [
        record.values
        for record in records
        if isinstance(record, Sample)
        and (record.source, record.arm) == ("client", arm)
        and begin_ns <= record.t_ns <= end_ns
    ]
    return {
        name: max((values[name] for values in own if name in values), default=None)
        for name in ("loop_lag_s", "cpu_share")
    }


def _lines(rows: Sequence[Request], window: Window) -> dict[str, Any]:
    """Values over the whole stage for plots: bins of equal length, in seconds from its begin."""
    times = [at_ns for row in rows for at_ns in (row.t_due_ns, row.t_done_ns) if at_ns is not None]
    if not times:
        return {}
    whole = Window(min(times), max(times) + 1)
    num_bins = max(1, min(_LINE_BINS, int(whole.duration_s / _LINE_BIN_S)))
    edges = edges_of(whole, num_bins)
    bin_s = whole.duration_s / num_bins

    def place(at_ns: int) -> int:
        return min(num_bins - 1, int((at_ns - whole.begin_ns) / 1e9 / bin_s))

    due, done, tokens = ([0.0] * num_bins for _ in range(3))
    waits: list[list[float]] = [[] for _ in range(num_bins)]
    for row in rows:
        if row.t_due_ns is not None:
            due[place(row.t_due_ns)] += 1 / bin_s
            if (wait_s := metrics.ttft_from_due_s(row)) is not None:
                waits[place(row.t_due_ns)].append(wait_s)
        if row.t_done_ns is not None and row.ok:
            done[place(row.t_done_ns)] += 1 / bin_s
        for at_ns, num in output_tokens(row):
            tokens[place(max(at_ns, whole.begin_ns))] += num / bin_s
    return {
        "t_s": [(edge - whole.begin_ns) / 1e9 for edge in edges[:-1]],
        "steady_begin_s": (window.begin_ns - whole.begin_ns) / 1e9,
        "steady_end_s": (window.end_ns - whole.begin_ns) / 1e9,
        "due_per_s": due,
        "answered_per_s": done,
        "output_tokens_per_s": tokens,
        "in_flight": means_in_flight(in_flight(rows), edges),
        "ttft_from_due_p50_s": [metrics.quantile(some, 0.5) if some else None for some in waits],
        "ttft_from_due_max_s": [max(some) if some else None for some in waits],
    }


def _pareto(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measured points that no other beats in both, by tokens/s of a user (MLPerf Endpoints)."""
    points = []
    for stage in stages:
        tpot_s = stage["latency"]["tpot_s"]["p90"]
        per_s = stage["tokens"]["output_per_s"]
        if tpot_s and per_s:
            label = stage["stage"] if stage["arm"] == "" else f"{stage['arm']} {stage['stage']}"
            points.append({"label": label, "user_per_s": 1 / tpot_s, "system_per_s": per_s})
    for point in points:
        point["best"] = not any(
            other["user_per_s"] >= point["user_per_s"]
            and other["system_per_s"] >= point["system_per_s"]
            and other != point
            for other in points
        )
    return sorted(points, key=lambda point: point["user_per_s"])

"""What to know about the figures of a load, in sentences; and what makes them worthless.

The client's limits are inference-perf's rule of thumb (late by more than 10 ms at the median) and
our own (less than 98 % of the scheduled rate; an event loop that stood still for a quarter of a
second).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.measure import metrics
from penstock.measure.environment import busy_note
from penstock.measure.records import Header, Mark, Request

LATE_S = 0.01
MIN_ACHIEVED = 0.98
MAX_LAG_S = 0.25
MAX_CACHED = 0.1  # of prompts without a common prefix; a template may be in the cache
_MAX_EXAMPLE = 160


def problems(made: Mapping[str, Any], steady: Sequence[Request], complete: bool) -> list[str]:
    """Why a stage is not valid."""
    found = []
    if not complete:
        found.append("The stage was interrupted before its end.")
    if not steady:
        return [*found, "No request was due in the steady window."]
    if not made["requests"]["num_ok"]:
        found.append(f"None of {len(steady)} requests was answered: {_errors(made)}.")
    late_s = _late_s(steady)
    if late_s is not None and late_s > LATE_S:
        found.append(
            f"The client was late: half of the requests left {late_s * 1e3:.1f} ms or more after "
            f"they were due (allowed: {LATE_S * 1e3:g} ms)."
        )
    scheduled, achieved = (made["rate"][f"{name}_per_s"] for name in ("scheduled", "achieved"))
    waited = any("cap_wait_s" in row.details for row in steady)
    if complete and scheduled and achieved < MIN_ACHIEVED * scheduled:
        why = " (the limit of concurrency held them back)" if waited else ""
        found.append(
            f"{achieved:.3g} of {scheduled:.3g} scheduled requests a second were sent, less than "
            f"{MIN_ACHIEVED:.0%}{why}."
        )
    lag_s = made["client"]["loop_lag_s"]
    if lag_s is not None and lag_s > MAX_LAG_S:
        found.append(
            f"The client stood still for {lag_s:.2g} s (allowed: {MAX_LAG_S:g} s): its times are "
            "late by as much."
        )
    return found


def of_stage(
    made: Mapping[str, Any],
    steady: Sequence[Request],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> list[str]:
    """What a reader must know of a stage's figures."""
    found = [*_of_requests(made, steady, facts), *_of_tokens(made["tokens"], settings)]
    found += _of_lengths(steady)
    if made["throughput_window"] != "steady":
        found.append(
            "The steady window is shorter than an answer: throughput is of the whole stage, its "
            "begin and end included."
        )
    if made["trends"]["saturated"]:
        found.append(
            "Saturated: requests in flight and the wait for the first token grew over the window. "
            "A longer run would show longer waits."
        )
    if made["loop"] == "closed":
        found.append(
            "Closed loop: clients wait for answers, so these latencies are those of this "
            "concurrency and not what users at a rate would see."
        )
    return found


def _of_requests(
    made: Mapping[str, Any], steady: Sequence[Request], facts: Mapping[str, Any]
) -> list[str]:
    requests = made["requests"]
    found = []
    if requests["num_errors"]:
        found.append(
            f"{requests['num_errors']} of {requests['num']} requests failed: {_errors(made)}. "
            "Latencies are of the others."
        )
    if requests["num_cut"]:
        found.append(
            f"{requests['num_cut']} requests were cut by the end of the run: neither good nor bad, "
            "and not in the latencies, which are then too low."
        )
    waits = [row.details["cap_wait_s"] for row in steady if "cap_wait_s" in row.details]
    if waits:
        found.append(
            f"The limit of {facts.get('max_concurrency')} requests at a time held back "
            f"{len(waits)} of {len(steady)}, for {sum(waits) / len(waits):.3g} s on average; this "
            "is in `queue_s` and in all times from due."
        )
    if requests["num_ok"] and not metrics.is_supported(requests["num_ok"], 0.99):
        weak = "p99 says" if metrics.is_supported(requests["num_ok"], 0.95) else "p95 and p99 say"
        found.append(f"{weak} little: fewer than 10 answers lie beyond.")
    if requests["num_prompts"] < requests["num"]:
        found.append(
            f"{requests['num']} requests had {requests['num_prompts']} different prompts; a prefix "
            "cache answers those that come again sooner."
        )
    return found


def _of_tokens(tokens: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    found = []
    cached = tokens["cached_share"]
    if settings.get("prefix") == "cold" and cached is not None and cached > MAX_CACHED:
        found.append(
            f"{cached:.0%} of prompt tokens came from the server's cache, although these prompts "
            "were to have nothing in common: were they sent to it before? Another --seed makes "
            "others."
        )
    if tokens["num_unknown"]:
        found.append(
            f"Nobody said how many tokens {tokens['num_unknown']} answers have: they are in no "
            "rate of tokens and have no tpot_s."
        )
    elif tokens["num_spread"]:
        found.append(
            f"Tokens of {tokens['num_spread']} answers are spread evenly over their chunks, "
            "because the server told only their sum."
        )
    return found


def _of_lengths(steady: Sequence[Request]) -> list[str]:
    """Answers of another length than the one that was fixed, as the server counts them."""
    asked = [
        (row.n_out, int(row.details["asked_out"]))
        for row in steady
        if row.ok and row.n_out is not None and row.count_source == "usage"
        if row.details.get("asked_out") is not None
    ]
    others = [(num_out, wanted) for num_out, wanted in asked if num_out != wanted]
    if not others:
        return []
    mean_out, mean_wanted = (sum(values) / len(asked) for values in zip(*asked, strict=True))
    return [
        f"{len(others)} of {len(asked)} answers have not the length that was fixed ({mean_out:.3g} "
        f"of {mean_wanted:.3g} tokens on average): the server ignores `ignore_eos`. Do "
        "not compare rates and whole answers with those of a server that does not."
    ]


def of_run(header: Header, marks: Sequence[Mark], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of the whole run, notes of its stages among it."""
    where: dict[str, list[str]] = {}
    for stage in stages:
        for note in stage["notes"]:
            where.setdefault(note, []).append(stage["stage"])
    found = [
        note if len(names) == len(stages) else f"{', '.join(names)}: {note}"
        for note, names in where.items()
    ]
    search = next((mark.facts for mark in marks if mark.name == "search"), None)
    found += named(stages, search, beyond=True)
    found += header.settings.get("notes", [])
    found += [mark.facts["message"] for mark in marks if mark.name == "note"]
    found += [f"The sweep ended: {one.facts['ended']}." for one in marks if one.name == "sweep"]
    if (busy := busy_note(header.environment)) is not None:
        found.append(busy)
    words = next((mark.facts for mark in marks if mark.name == "words"), None)
    if words is not None:
        found.append(f"Lengths of made-up prompts: {words['source']}.")
    return found


def unfinished(
    header: Header, marks: Sequence[Mark], stages: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Whether a sweep or a search was cut, also where each stage that it has is whole."""
    planned = header.settings.get("sweep")
    if planned is None or any(mark.name in ("sweep", "search") for mark in marks):
        return []
    of = planned.get("rates") or planned.get("concurrencies")
    return [
        f"The sweep was interrupted: {len(stages)} stages were begun"
        f"{f' of {of}' if of else ', and no end was found'}."
    ]


def named(
    stages: Sequence[Mapping[str, Any]], search: Mapping[str, Any] | None, *, beyond: bool = False
) -> list[str]:
    """Problems of the stages that a run's answer rests on, each with its stage's name.

    Args:
        search: what a search came to. A rate that it found too high may well have problems.
        beyond: those of the other stages instead.
    """
    too_high = {
        f"rate={one['rate']:g}" for one in (search or {"tried": []})["tried"] if not one["passed"]
    }
    if not stages and not beyond:
        return ["No load was begun."]
    return [
        f"{stage['stage'] + ': ' if len(stages) > 1 else ''}{problem}"
        for stage in stages
        if (stage["stage"] in too_high) is beyond
        for problem in stage["problems"]
    ]


def outcome(judged: Mapping[str, Any]) -> str:
    """What became of a limit over many requests."""
    if judged["undecided"]:
        return "undecided, since requests were cut that may break it"
    return "kept" if judged["kept"] else "broken"


def answer(found: Mapping[str, Any]) -> str:
    """What a search for the highest rate came to."""
    low, high = found["highest_passing"], found["lowest_failing"]
    passing = "No rate that was tried keeps" if low is None else f"{low:g} requests a second keep"
    failing = "" if high is None else f", {high:g} do not"
    return f"{passing} the limits{failing} ({found['ended']})."


def _late_s(steady: Sequence[Request]) -> float | None:
    """Median lateness of the client, without the wait for a place and for the server to connect."""
    late = [
        queue_s - row.details.get("cap_wait_s", 0.0) - row.details.get("connect_s", 0.0)
        for row in steady
        if (queue_s := metrics.queue_s(row)) is not None
    ]
    return metrics.quantile(late, 0.5) if late else None


def _errors(made: Mapping[str, Any]) -> str:
    """How many of which error, and the text of the first of the most frequent."""
    errors, examples = made["requests"]["errors"], made["requests"]["error_examples"]
    if not errors:
        return "all were cut"
    told = ", ".join(f"{num} {name}" for name, num in errors.items())
    example = examples[next(iter(errors))][:_MAX_EXAMPLE]
    return f"{told} ({example.rstrip('.')})" if example else told

"""The provider leaderboard, from the records of a tracker. Pure: what is exported can be verified.

A record of a tracked request has its series as `arm` and its slot (seconds since 1970) as `stage`;
each slot is a mark `slot` with its state and what the series cost. Failures stay in: a percentile
is of the answers that came, and beside it stands how many did not. Requests of slots before
`since` are the reference of the drift alarm and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.measure.meters.price_lists import Price
from penstock.measure.meters.prices import cost
from penstock.measure.metrics import e2e_s, quantile, tpot_s, ttft_s
from penstock.measure.records import Header, Mark, Record, Request
from penstock.measure.track.drift import Drift, answer_drift, first_token_drift
from penstock.measure.track.probe import CANARY, FIRST_TOKEN, SPEED
from penstock.measure.track.states import FAILED

FORMULAS = {
    "ttft_s": "time to first token: from sending to the first token; p99 is the slow tail",
    "tokens_per_s": "tokens of an answer / its time from sending to its end, where the server "
    "counts tokens; p10 is the slow tail",
    "decode_tokens_per_s": "1 / tpot_s of each answer",
    "availability": "mean over slots of answered / (answered + failed); 0 for a slot in which the "
    "provider could not be reached; refusals for the rate (429), requests that were cut off with "
    "the tracker, and missed slots are not in it",
    "usd_per_1m_output_tokens": "all that a cell's answers cost, input included, at the price of "
    "their slot / their output tokens * 1e6",
}
_SLOWEST = 0.1  # of speeds, where small is bad


def figures(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """What `penstock track show` prints: series, their cells, their slots, alarms."""
    since = header.settings["since"]
    slots = [record for record in records if isinstance(record, Mark) and record.name == "slot"]
    by_series: dict[str, list[Request]] = defaultdict(list)
    for row in records:
        if isinstance(row, Request):
            by_series[row.arm].append(row)
    names = sorted({mark.arm for mark in slots} | by_series.keys())
    series = {
        name: _series(
            [mark for mark in slots if mark.arm == name],
            [row for row in by_series[name] if int(row.stage) >= since],
        )
        for name in names
    }
    alarms = _alarms(header, by_series, names)
    return {"series": series, "drift": alarms, "formulas": FORMULAS}, []


def _series(slots: Sequence[Mark], rows: Sequence[Request]) -> dict[str, Any]:
    states = Counter(mark.facts["state"] for mark in slots)
    prices = {
        int(mark.stage): msgspec.convert(mark.facts["price"], Price)
        for mark in slots
        if mark.facts.get("price")
    }
    silent = sum(mark.facts["state"] == FAILED for mark in slots)
    cells: dict[tuple[int, int, int], list[Request]] = defaultdict(list)
    for row in rows:
        if row.task == SPEED:
            cells[_shape(row)].append(row)
    told = [mark.facts for mark in slots if "price" in mark.facts]
    return {
        "slots": dict(sorted(states.items())),
        "reasons": _reasons(slots),
        "price": told[-1]["price"] if told else None,
        "no_price": told[-1].get("no_price") if told else None,
        **_failures(rows, silent),
        "cells": [_cell(shape, cells[shape], prices, silent) for shape in sorted(cells)],
        "by_slot": _by_slot(cells),
    }


def _shape(row: Request) -> tuple[int, int, int]:
    """The cell of a speed request."""
    details = row.details
    return details["input_tokens"], details["output_tokens"], details["concurrency"]


def _reasons(slots: Sequence[Mark]) -> dict[str, int]:
    """Why slots were not probed whole, the most frequent reason first."""
    reasons = Counter(mark.facts["reason"] for mark in slots if mark.facts.get("reason"))
    return dict(sorted(reasons.items(), key=lambda one: (-one[1], one[0])))


def _failures(rows: Iterable[Request], num_silent: int) -> dict[str, Any]:
    """What became of requests, besides `num_silent` slots in which none could be made."""
    classes: Counter[str] = Counter()
    by_slot: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        kind = "ok" if row.ok else row.error_class or "unfinished"
        classes[kind] += 1
        by_slot[row.stage][kind] += 1
    shares = [0.0] * num_silent
    for kinds in by_slot.values():
        if asked := kinds.total() - kinds["http_429"] - kinds["cut"]:
            shares.append(kinds["ok"] / asked)
    num_ok = classes.pop("ok", 0)
    return {
        "num_ok": num_ok,
        "num_rate_limited": classes.get("http_429", 0),
        "errors": dict(sorted(classes.items())),
        "availability": math.fsum(shares) / len(shares) if shares else None,
    }


def _cell(
    shape: tuple[int, int, int],
    rows: Sequence[Request],
    prices: Mapping[int, Price],
    num_silent: int,
) -> dict[str, Any]:
    good = [row for row in rows if row.ok]
    costs = [(usd, row.n_out) for row in good if (usd := _usd(row, prices)) is not None]
    num_paid = sum(num_out or 0 for _, num_out in costs)
    return {
        "input_tokens": shape[0],
        "output_tokens": shape[1],
        "concurrency": shape[2],
        **_failures(rows, num_silent),
        "measured_input_tokens": _middle(row.n_in for row in good),
        "measured_output_tokens": _middle(_num_out(row) for row in good),
        "ttft_s": _marks([ttft_s(row) for row in good], (0.5, 0.9, 0.99)),
        "e2e_s": _marks([e2e_s(row) for row in good], (0.5, 0.9, 0.99)),
        "tokens_per_s": _marks([_speed(row) for row in good], (0.5, _SLOWEST)),
        "decode_tokens_per_s": _marks([_inverse(tpot_s(row)) for row in good], (0.5, _SLOWEST)),
        "usd_per_1m_output_tokens": (
            sum(usd for usd, _ in costs) / num_paid * 1e6 if num_paid else None
        ),
    }


def _usd(row: Request, prices: Mapping[int, Price]) -> float | None:
    """What an answer cost at its slot's price."""
    price = prices.get(int(row.stage))
    return None if price is None else cost(row, price).usd


def _speed(row: Request) -> float | None:
    took_s, num_out = e2e_s(row), _num_out(row)
    return num_out / took_s if num_out and took_s else None


def _num_out(row: Request) -> int | None:
    """Tokens of an answer; None where chunks were counted instead, which are no tokens."""
    return None if row.count_source in ("chunks", "none") else row.n_out


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _middle(values: Iterable[int | None]) -> float | None:
    there = [value for value in values if value is not None]
    return quantile(there, 0.5) if there else None


def _marks(values: Sequence[float | None], marks: Sequence[float]) -> dict[str, float | int | None]:
    there = [value for value in values if value is not None]
    found = {f"p{100 * q:g}": quantile(there, q) if there else None for q in marks}
    return {"n": len(there), **found}


def _by_slot(cells: Mapping[tuple[int, int, int], Sequence[Request]]) -> list[dict[str, Any]]:
    """The time series: medians of a slot's requests of a cell; cells are not comparable."""
    slots: dict[tuple[tuple[int, int, int], int], list[Request]] = defaultdict(list)
    for shape, rows in cells.items():
        for row in rows:
            slots[shape, int(row.stage)].append(row)
    return [
        {
            "slot": slot[1],
            **dict(zip(("input_tokens", "output_tokens", "concurrency"), slot[0], strict=True)),
            "n": len(slots[slot]),
            "num_ok": sum(row.ok for row in slots[slot]),
            "ttft_s": _marks([ttft_s(row) for row in slots[slot] if row.ok], (0.5,))["p50"],
            "tokens_per_s": _marks([_speed(row) for row in slots[slot] if row.ok], (0.5,))["p50"],
        }
        for slot in sorted(slots)
    ]


# -- drift -----------------------------------------------------------------------------------------


def _alarms(
    header: Header, by_series: Mapping[str, Sequence[Request]], names: Sequence[str]
) -> list[dict[str, Any]]:
    settings = header.settings
    num_tests = 2 * max(len(names), 1)
    # Bonferroni over all tests of a year: the promise is kept, at the price of a late alarm.
    alpha = settings["false_alarms_per_year"] / (settings["slots_per_year"] * num_tests)
    window_slots = settings["window_slots"]
    found = []
    for name in names:
        slots = _answered(by_series[name], 0)
        window = set([slot for slot in slots if slot >= settings["since"]][-window_slots:])
        other = settings["references"].get(name)
        if other is None:
            reference = set(slots[: settings["reference_slots"]]) - window
            source, rows = "its own first slots", by_series[name]
        else:
            reference = set(_answered(by_series.get(other, ()), settings["since"]))
            source, rows = other, by_series.get(other, ())
        for what, task, test in (
            ("first tokens", FIRST_TOKEN, first_token_drift),
            ("answers", CANARY, answer_drift),
        ):
            drift = test(_counts(rows, task, reference), _counts(by_series[name], task, window))
            found.append(_told(name, what, source, drift, alpha))
    return found


def _told(name: str, what: str, source: str, drift: Drift | None, alpha: float) -> dict[str, Any]:
    return {
        "series": name,
        "what": what,
        "reference": source,
        "alpha": alpha,
        "p_value": None if drift is None else drift.p_value,
        "statistic": None if drift is None else drift.statistic,
        "num_reference": 0 if drift is None else drift.num_reference,
        "num_window": 0 if drift is None else drift.num_window,
        "alarm": drift is not None and drift.p_value < alpha,
    }


def _answered(rows: Iterable[Request], since: int) -> list[int]:
    """The slots in which a canary was answered, oldest first."""
    slots = {int(row.stage) for row in rows if row.task == CANARY and row.ok}
    return sorted(slot for slot in slots if slot >= since)


def _counts(rows: Iterable[Request], task: str, slots: set[int]) -> dict[str, Counter[str]]:
    """How often each output came, by what was asked: a canary may be another one tomorrow."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.task == task and row.ok and row.output is not None and int(row.stage) in slots:
            counts[row.prompt_hash][row.output] += 1
    return counts


def drift_summary(drifts: Sequence[Mapping[str, Any]]) -> str:
    """What the tests say together; that nothing was found is told only of what was tested."""
    if alarms := [drift for drift in drifts if drift["alarm"]]:
        told = "; ".join(sentence(drift) for drift in alarms)
        return f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}: {told}."
    tested = {drift["series"] for drift in drifts if drift["p_value"] is not None}
    waiting = sorted({drift["series"] for drift in drifts} - tested)
    if not tested:
        return "Drift: not enough slots yet to compare a series with its reference."
    told = "No series has drifted from its reference."
    return f"{told} Not enough slots yet to tell of {', '.join(waiting)}." if waiting else told


def sentence(drift: Mapping[str, Any]) -> str:
    """An alarm in words."""
    return f"{drift['what']} of {drift['series']} differ from {drift['reference']}"

"""Sweeps and searches over a queue whose capacity is known: four places, 50 ms an answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest

from penstock.measure.load import arrivals, search, slo
from penstock.measure.load.figures import load_figures
from penstock.measure.load.search import Point
from penstock.measure.records import Mark, Request

PLACES, ANSWER_S, DURATION_S = 4, 0.05, 20.0
CAPACITY = PLACES / ANSWER_S  # 80 requests a second
LIMITS = slo.parse("e2e_p95=0.2s")
S = 10**9


def figures_at(point: Point) -> dict[str, Any]:
    """A stage on the queue, in no time at all."""
    free = [0.0] * PLACES
    rows = []
    if point.rate is not None:
        dues = arrivals.due_times(arrivals.steady(point.rate), seed=1, duration_s=DURATION_S)
    else:
        assert point.concurrency is not None
        dues = [0.0] * point.concurrency
    for index, due in enumerate(dues):  # grows in closed loop
        place = min(range(PLACES), key=free.__getitem__)
        begin = max(due, free[place])
        free[place] = end = begin + ANSWER_S
        if point.rate is None and end < DURATION_S:
            dues.append(end)
        rows.append(
            Request(
                index=index,
                stage=point.stage,
                t_due_ns=round(due * S),
                t_sent_ns=round(due * S),
                t_first_ns=round((begin + 0.01) * S),
                t_last_ns=round(end * S),
                t_done_ns=round(end * S),
                n_out=10,
                count_source="usage",
            )
        )
    loop = {"loop": "open", "rate": point.rate} if point.rate else {"loop": "closed"}
    marks = [
        Mark(t_ns=0, stage=point.stage, name="stage_begin", facts=loop),
        Mark(t_ns=0, stage=point.stage, name="steady_begin"),
        Mark(t_ns=round(DURATION_S * S), stage=point.stage, name="steady_end"),
        Mark(t_ns=round(30 * S), stage=point.stage, name="stage_end"),
    ]
    return load_figures(rows, marks, limits=LIMITS)


class Measured:
    """Remembers which points were measured."""

    def __init__(self) -> None:
        self.points: list[Point] = []

    async def __call__(self, point: Point) -> Mapping[str, Any]:
        self.points.append(point)
        return figures_at(point)


pytestmark = pytest.mark.anyio


@functools.cache
def highest_by_trial() -> float:
    """The truth, by trying every rate of the seeded schedule."""
    rates = [rate for rate in range(60, 90) if figures_at(Point(rate=rate))["slo"][0]["kept"]]
    return float(max(rates))


@pytest.mark.parametrize("start", [1.5, 60.0, 700.0])
async def test_the_highest_rate_within_limits_is_found(start: float) -> None:
    measured = Measured()
    found = await search.highest_rate(measured, start=start, precision=0.02)
    truth = highest_by_trial()
    assert 0.8 * CAPACITY < truth < 1.1 * CAPACITY
    assert found.highest_passing is not None
    assert found.lowest_failing is not None
    assert found.highest_passing <= found.lowest_failing <= found.highest_passing * 1.03
    assert found.highest_passing == pytest.approx(truth, rel=0.04)
    assert [tried.rate for tried in found.tried] == [point.rate for point in measured.points]
    passing = [tried.rate for tried in found.tried if tried.passed]
    failing = [tried.rate for tried in found.tried if not tried.passed]
    assert found.highest_passing == max(passing) < min(failing) == found.lowest_failing
    assert "e2e_p95" in found.tried[-1].why or found.tried[-1].passed


async def test_no_rate_is_claimed_that_was_not_allowed() -> None:
    found = await search.highest_rate(Measured(), start=5, most=20)
    assert (found.highest_passing, found.lowest_failing) == (20, None)
    assert "20, passes" in found.ended


async def test_a_client_that_is_late_ends_the_search() -> None:
    async def late(point: Point) -> Mapping[str, Any]:
        return {**figures_at(point), "problems": ["The client was late."]}

    found = await search.highest_rate(late, start=5)
    assert len(found.tried) == 1
    assert "The client was late" in found.ended


async def test_a_search_ends() -> None:
    async def never(point: Point) -> Mapping[str, Any]:
        return {**figures_at(point), "slo": [{"limit": "x", "kept": False}]}

    found = await search.highest_rate(never, start=5, num_stages=6)
    assert (found.highest_passing, len(found.tried)) == (None, 6)


async def test_a_sweep_ends_at_saturation() -> None:
    """Four places: throughput doubles up to 4 clients, and then stays."""
    measured = Measured()
    ended = await search.sweep(search.clients_up_to(100), measured)
    assert [point.concurrency for point in measured.points] == [1, 2, 4, 8, 16]
    assert "not risen" in ended


async def test_a_sweep_of_rates_ends_where_queues_grow() -> None:
    measured = Measured()
    ended = await search.sweep([Point(rate=rate) for rate in (20, 60, 120, 200)], measured)
    assert [point.rate for point in measured.points] == [20, 60, 120]
    assert "rate=120 is saturated" in ended


def test_points() -> None:
    numbers = [point.concurrency for point in search.clients_up_to(100)]
    assert numbers == [1, 2, 4, 8, 16, 32, 64, 100]
    assert [point.concurrency for point in search.clients_up_to(1)] == [1]
    assert [point.concurrency for point in search.clients_up_to(8)] == [1, 2, 4, 8]
    assert Point(rate=2.5).stage == "rate=2.5"
    assert math.isinf(Point(rate=math.inf).rate or 0)


@pytest.mark.parametrize(
    ("rate", "saturated"), [(40, False), (60, False), (72, False), (88, True), (120, True)]
)
def test_saturation_is_seen_above_capacity_only(rate: float, saturated: bool) -> None:
    assert figures_at(Point(rate=rate))["trends"]["saturated"] is saturated


async def test_the_highest_rate_allowed_is_tried_as_it_was_written() -> None:
    found = await search.highest_rate(Measured(), start=5, most=17.77)
    assert (found.highest_passing, found.lowest_failing) == (17.77, None)
    assert found.tried[-1].rate == 17.77
    assert "passes" in found.ended


def stage(**more: Any) -> dict[str, Any]:
    """Figures of a stage, as far as a search looks at them."""
    made: dict[str, Any] = {"slo": [{"limit": "x", "kept": True}], "goodput": None, "problems": []}
    made |= {"trends": {"saturated": False}, "requests": {"num_ok": 9}}
    made |= {"tokens": {"output_per_s": 1.0}, "rate": {"answered_per_s": 1.0}}
    return made | more


async def test_a_saturated_rate_does_not_pass_and_a_bracket_is_as_narrow_as_asked() -> None:
    """Limits are kept everywhere: above 10 a second only the queue grows."""

    async def measure(point: Point) -> Mapping[str, Any]:
        return stage(trends={"saturated": (point.rate or 0) > 10})

    found = await search.highest_rate(measure, start=1, precision=0.1)
    assert found.lowest_failing is not None
    assert found.highest_passing is not None
    assert found.highest_passing <= 10 < found.lowest_failing
    assert found.lowest_failing <= found.highest_passing * 1.1
    assert {tried.why for tried in found.tried} == {"", "saturated"}


async def test_a_rise_of_two_per_cent_is_none() -> None:
    points: list[Point] = []

    async def measure(point: Point) -> Mapping[str, Any]:
        points.append(point)
        return stage(tokens={"output_per_s": 100 * 1.02 ** len(points)})

    await search.sweep(search.clients_up_to(256), measure)
    assert len(points) == 3

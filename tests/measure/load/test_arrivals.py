"""Due times: the process that was asked for, and nothing stretched."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from penstock.errors import ConfigError
from penstock.measure.load import arrivals


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def test_a_constant_rate() -> None:
    times = arrivals.due_times(arrivals.steady(4), seed=1, burstiness=math.inf, duration_s=10)
    assert times == pytest.approx([n / 4 for n in range(40)])


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_their_mean_and_their_variation(shape: float) -> None:
    times = arrivals.due_times(arrivals.steady(5), seed=3, burstiness=shape, num=20_000)
    between = gaps([0.0, *times])
    mean, deviation = statistics.fmean(between), statistics.stdev(between)
    assert mean == pytest.approx(1 / 5, rel=0.05)
    assert deviation / mean == pytest.approx(1 / math.sqrt(shape), rel=0.05)


def test_the_number_of_a_poisson_process_varies_as_much_as_its_mean() -> None:
    """A schedule that were stretched to its rate would have the same number every time."""
    counts = [
        len(arrivals.due_times(arrivals.steady(20), seed=seed, duration_s=5)) for seed in range(300)
    ]
    assert statistics.fmean(counts) == pytest.approx(100, rel=0.03)
    assert statistics.variance(counts) == pytest.approx(100, rel=0.3)


def test_a_seed_is_a_schedule() -> None:
    one, again, other = (
        arrivals.due_times(arrivals.steady(3), seed=seed, num=50) for seed in (7, 7, 8)
    )
    assert one == again != other


def test_a_longer_schedule_begins_as_a_shorter_one() -> None:
    short = arrivals.due_times(arrivals.steady(3), seed=7, duration_s=5)
    long = arrivals.due_times(arrivals.steady(3), seed=7, duration_s=9)
    assert long[: len(short)] == short


def test_a_ramp_is_half_the_load() -> None:
    times = arrivals.due_times(
        arrivals.steady(10, ramp_s=4), seed=1, burstiness=math.inf, duration_s=6
    )
    assert sum(time < 4 for time in times) == 20
    for number, time in enumerate(times):
        expected = 10 * time**2 / 8 if time < 4 else 20 + 10 * (time - 4)
        assert expected == pytest.approx(number, abs=1e-9)


def test_a_schedule_of_rates() -> None:
    rates = arrivals.parse_rates("3@2, 2@2-6,2s@6-0")
    times = arrivals.due_times(rates, seed=1, burstiness=math.inf)
    counts = [sum(low <= time < high for time in times) for low, high in ((0, 3), (3, 5), (5, 7))]
    assert counts == [6, 8, 6]
    assert max(times) < 7


@pytest.mark.parametrize(
    "text", ["", "3", "3@", "@2", "0@2", "3@0", "3@-1", "x@2", "3@2-", "3@1.2.3"]
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ConfigError, match="`--rate-schedule`"):
        arrivals.parse_rates(text)


def test_all_at_once() -> None:
    assert arrivals.due_times(arrivals.steady(math.inf), seed=1, num=3) == [0.0] * 3


def test_a_trace_keeps_its_offsets() -> None:
    offsets = [0.0, 0.013, 2.5, 2.5, 7.25]
    assert arrivals.replayed(offsets) == offsets
    assert arrivals.replayed(offsets, time_scale=0.5) == [0.0, 0.0065, 1.25, 1.25, 3.625]
    assert arrivals.replayed(offsets, time_scale=2, duration_s=5) == [0.0, 0.026]

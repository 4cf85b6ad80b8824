"""Tokens, flights and trends over time, against hand-made truths and scipy's."""

from __future__ import annotations

from random import Random

import pytest

from penstock.measure.load import timeline
from penstock.measure.load.figures import load_figures
from penstock.measure.load.timeline import Window
from penstock.measure.records import Mark, Request

S = 10**9


def streamed(times_s: list[float], packed: int = 1, *, told: bool = True) -> Request:
    """An answer whose tokens exist at `times_s` and are sent when `packed` are together."""
    ends = [*range(packed - 1, len(times_s), packed)]
    if ends[-1] != len(times_s) - 1:
        ends.append(len(times_s) - 1)
    counts = [end - before for before, end in zip([-1, *ends], ends, strict=False)]
    row = Request(
        t_sent_ns=0,
        chunk_t_ns=[round(times_s[end] * S) for end in ends],
        chunk_n=counts if told else [],
        n_out=len(times_s),
        count_source="usage",
    )
    row.t_first_ns, row.t_last_ns = row.chunk_t_ns[0], row.chunk_t_ns[-1]
    row.t_done_ns = row.t_last_ns
    return row


@pytest.mark.parametrize("told", [True, False])
def test_packing_changes_no_rate(told: bool) -> None:
    """40 streams of 100 tokens/s through a window: 4 tokens a chunk are as many as 1."""
    window = Window(2 * S, 8 * S)
    starts = [number / 40 for number in range(40)]
    rates = []
    for packed in (1, 4, 16):
        rows = [
            streamed([start + n / 100 for n in range(1, 1001)], packed, told=told)
            for start in starts
        ]
        rates.append(timeline.output_in(rows, window) / window.duration_s)
    assert rates[0] == pytest.approx(4000, rel=0.001)
    assert rates[1] == pytest.approx(rates[0], rel=0.01)
    assert rates[2] == pytest.approx(rates[0], rel=0.02)


def test_whose_tokens_count() -> None:
    window = Window(0, 10 * S)
    whole = Request(t_done_ns=S, n_out=5, count_source="usage")  # not streamed
    assert timeline.output_in([whole], window) == 5
    unknown = streamed([1.0, 2.0])
    unknown.chunk_n, unknown.count_source = [], "none"
    assert timeline.output_in([unknown], window) == 0
    short = streamed([1.0, 2.0])
    short.n_out = 6  # the chunks' counts are of something else: the sum is the server's
    assert timeline.output_in([short], window) == 6
    cut = streamed([1.0, 2.0, 3.0])
    cut.error_class, cut.n_out = "cut", None
    assert timeline.output_in([cut], window) == 3
    failed = streamed([1.0, 2.0])
    failed.error_class = "server"
    assert timeline.output_in([failed], window) == 0


def test_prompts_count_when_their_first_token_comes() -> None:
    rows = [Request(n_in=7, t_first_ns=at * S, t_done_ns=9 * S) for at in (1, 2, 3)]
    assert timeline.input_in(rows, Window(2 * S, 3 * S)) == 7


def test_flights() -> None:
    rows = [
        Request(t_sent_ns=0, t_done_ns=4),
        Request(t_sent_ns=1, t_done_ns=3),
        Request(t_sent_ns=3, t_done_ns=6),
        Request(t_due_ns=1),  # never sent
    ]
    steps = timeline.in_flight(rows)
    assert steps == [(0, 1), (1, 2), (3, 2), (4, 1), (6, 0)]
    assert timeline.means_in_flight(steps, [0, 2, 4, 10]) == [1.5, 2.0, pytest.approx(2 / 6)]
    assert timeline.means_in_flight(steps, [2, 3]) == [2.0]


def test_trends_as_scipy_has_them() -> None:
    from scipy import stats

    chance = Random(5)
    for slope in (-0.5, 0.0, 0.05, 0.2, 1.0):
        values = [10 + slope * x + chance.gauss(0, 1) for x in range(12)]
        found = timeline.trend(values)
        truth = stats.linregress(range(12), values, alternative="greater")
        assert found is not None
        assert found.p_value == pytest.approx(truth.pvalue, abs=2e-3)
        assert found.growth == pytest.approx(truth.slope * 11 / (sum(values) / 12))


def test_gaps_and_edges_of_trends() -> None:
    assert timeline.trend([1.0, 2.0, None, 3.0]) is None
    assert timeline.trend([0.0] * 12) is None
    line = timeline.trend([1.0, None, 3.0, 4.0, 5.0, 6.0])
    assert line is not None
    assert line.rises
    flat = timeline.trend([2.0] * 12)
    assert flat is not None
    assert not flat.rises
    slight = timeline.trend([100.0 + x for x in range(12)])  # certain, and of no account
    assert slight is not None
    assert slight.p_value < 0.001
    assert not slight.rises


def test_a_busy_queue_is_seldom_called_saturated_and_an_overloaded_one_is() -> None:
    """30 s of eight servers of 0.5 s: how often, over seeds, the rule says so."""

    def share(load: float, num: int = 40) -> float:
        found = 0
        for seed in range(num):
            chance, at_s = Random(seed), 0.0
            rows: list[Request] = []
            free = [0.0] * 8
            while (at_s := at_s + chance.expovariate(load * 16)) < 30:
                place = min(range(8), key=free.__getitem__)
                begin_s = max(at_s, free[place])
                free[place] = begin_s + chance.expovariate(2)
                row = Request(t_due_ns=int(at_s * S), t_sent_ns=int(at_s * S))
                row.t_done_ns = int(min(free[place], 90) * S)
                if begin_s < 90:
                    row.t_first_ns = int(begin_s * S)
                if free[place] > 90:
                    row.error_class = "cut"
                rows.append(row)
            edges = [Mark(t_ns=0, name="steady_begin"), Mark(t_ns=30 * S, name="steady_end")]
            found += load_figures(rows, edges)["trends"]["saturated"]
        return found / num

    assert share(0.8) <= 0.1
    assert share(1.5) >= 0.9
    assert share(20.0, num=1) == 1  # nearly nobody of the second half was served at all


def test_a_window_has_its_begin_and_not_its_end() -> None:
    window = Window(S, 2 * S)
    held = [window.holds(at_ns) for at_ns in (S - 1, S, 2 * S - 1, 2 * S)]
    assert held == [False, True, True, False]

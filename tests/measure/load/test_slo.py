"""Limits: how they are written, and who keeps them."""

from __future__ import annotations

import math

import pytest

from penstock.errors import ConfigError
from penstock.measure.load import slo
from penstock.measure.load.slo import Limit
from penstock.measure.records import Request

S = 10**9


def answered(e2e_s: float, *, queue_s: float = 0.0, num_out: int = 11) -> Request:
    """An answer: its first token after a tenth of its time."""
    sent = round(queue_s * S)
    return Request(
        t_due_ns=0,
        t_sent_ns=sent,
        t_first_ns=sent + round(e2e_s * S / 10),
        t_last_ns=sent + round(e2e_s * S),
        t_done_ns=sent + round(e2e_s * S),
        n_out=num_out,
        count_source="usage",
    )


def failed() -> Request:
    return Request(t_due_ns=0, t_sent_ns=0, t_done_ns=1, error_class="http_429")


def cut(after_s: float, *, first_s: float | None = None) -> Request:
    first_ns = None if first_s is None else round(first_s * S)
    return Request(
        t_due_ns=0,
        t_sent_ns=0,
        t_first_ns=first_ns,
        t_done_ns=round(after_s * S),
        error_class="cut",
    )


def test_how_limits_are_written() -> None:
    assert slo.parse("ttft_p95=0.5s, tpot_p99.9<50ms,e2e<=2s error_rate=1%,queue_mean=300us") == [
        Limit(metric="ttft", of="p95", limit=0.5),
        Limit(metric="tpot", of="p99.9", limit=0.05),
        Limit(metric="e2e", limit=2.0),
        Limit(metric="error_rate", limit=0.01),
        Limit(metric="queue", of="mean", limit=pytest.approx(0.0003)),
    ]
    assert slo.parse("ttft_sent_p90=1s,e2e_sent=2s") == [
        Limit(metric="ttft_sent", of="p90", limit=1.0),
        Limit(metric="e2e_sent", limit=2.0),
    ]
    assert slo.parse("") == []


def test_vllms_way_is_in_milliseconds() -> None:
    assert slo.parse("ttft:500 tpot:50 e2el:2000") == slo.parse("ttft=0.5s tpot=50ms e2e=2s")


@pytest.mark.parametrize(
    "text",
    ["ttft", "ttft=5", "ttft=-1s", "itl=1s", "ttft_p95", "ttft_p0=1s", "ttft_p100=1s", "ttft=1h",
     "error_rate_p95=1", "error_rate=5", "error_rate=1s", "ttft=1%", "ttft_p95=0.5s;tpot=1s",
     "goodput=1s"],
)  # fmt: skip
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ConfigError, match="`"):
        slo.parse(text)


def test_a_users_wait_begins_when_the_request_is_due() -> None:
    row = answered(1.0, queue_s=0.5)
    assert slo.is_good(row, slo.parse("e2e=1.4s")) is False
    assert slo.is_good(row, slo.parse("e2e=1.6s,ttft=0.65s")) is True
    assert slo.is_good(row, slo.parse("e2e_sent=1.1s")) is True


def test_who_is_good() -> None:
    limits = slo.parse("e2e=2s,tpot=50ms,e2e_p95=1ms")  # of quantiles nothing is asked of one
    assert slo.is_good(answered(0.5), limits) is True
    assert slo.is_good(answered(1.0), limits) is False  # 90 ms a token
    assert slo.is_good(answered(1.0, num_out=1), limits) is True  # one token: no time between
    assert slo.is_good(failed(), limits) is False
    assert slo.is_good(cut(1.0), limits) is None
    assert slo.is_good(cut(2.5), limits) is False
    assert slo.is_good(cut(1.0, first_s=0.9), slo.parse("ttft=0.5s")) is False
    assert slo.is_good(cut(1.0, first_s=0.4), slo.parse("ttft=0.5s")) is None


def test_quantiles_are_type_7_and_failures_wait_for_ever() -> None:
    rows = [answered(n / 100) for n in range(1, 101)]
    (found,) = slo.judge(rows, slo.parse("e2e_p95=1s"))
    assert found["value"] == pytest.approx(0.9505)
    assert (found["kept"], found["n"]) == (True, 100)
    (with_four,) = slo.judge([*rows, *(failed() for _ in range(4))], slo.parse("e2e_p95=1s"))
    assert with_four["value"] == pytest.approx(0.9885)  # place 0.95 x 103 = 97.85
    (with_ten,) = slo.judge([*rows, *(failed() for _ in range(10))], slo.parse("e2e_p95=1s"))
    assert (with_ten["value"], with_ten["kept"]) == (None, False)


def test_the_place_just_before_a_failure_is_finite() -> None:
    rows = [*(answered(1.0) for _ in range(20)), failed()]
    (found,) = slo.judge(rows, slo.parse("e2e_p95=1.5s"))  # place 0.95 x 20 = 19: the last answer
    assert found["value"] == pytest.approx(1.0)


def test_cut_requests_count_only_where_they_are_late_already() -> None:
    rows = [*(answered(0.1) for _ in range(9)), cut(0.5)]
    assert slo.judge(rows, slo.parse("e2e_p99=1s"))[0]["n"] == 9
    late = slo.judge([*rows, cut(1.5)], slo.parse("e2e_p99=1s"))[0]
    assert (late["n"], late["kept"]) == (10, False)


def test_share_of_errors_and_means() -> None:
    rows = [answered(1.0), answered(2.0), failed(), cut(0.1)]
    (errors,) = slo.judge(rows, slo.parse("error_rate=30%"))
    assert (errors["value"], errors["kept"], errors["n"]) == (pytest.approx(1 / 3), False, 3)
    (mean,) = slo.judge(rows[:2], slo.parse("e2e_mean=1.5s"))
    assert (mean["value"], mean["kept"]) == (1.5, True)


def test_nothing_known_is_nothing_kept() -> None:
    (found,) = slo.judge([], slo.parse("ttft_p95=1s"))
    assert (found["value"], found["kept"], found["n"]) == (None, False, 0)
    assert not math.isnan(found["n"])


def test_a_limit_that_the_cut_may_break_is_not_kept() -> None:
    """Half of them waited 1 s when the run ended: nobody knows their quantile."""
    rows = [*(answered(0.1) for _ in range(5)), *(cut(1.0) for _ in range(5))]
    (found,) = slo.judge(rows, slo.parse("e2e_p95=2s"))
    assert (found["kept"], found["undecided"]) == (False, True)
    (median,) = slo.judge([*rows, answered(0.1), answered(0.1)], slo.parse("e2e_p50=2s"))
    assert (median["kept"], median["undecided"]) == (True, False)
    (first,) = slo.judge([cut(1.0, first_s=0.4)], slo.parse("ttft_p95=0.5s"))
    assert first["kept"]  # that part of it was over
    (broken,) = slo.judge([answered(3.0), cut(1.0)], slo.parse("e2e_mean=2s"))
    assert (broken["kept"], broken["undecided"]) == (False, False)


def test_an_answer_whose_figure_is_unknown_is_neither_good_nor_bad() -> None:
    uncounted = answered(1.0)
    uncounted.count_source, uncounted.chunk_n = "chunks", []
    assert slo.is_good(uncounted, slo.parse("tpot=50ms")) is None
    whole = answered(1.0)
    whole.t_first_ns = None
    assert slo.is_good(whole, slo.parse("ttft=1s")) is None
    assert slo.is_good(whole, slo.parse("ttft=1s,e2e=0.5s")) is False

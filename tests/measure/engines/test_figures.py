"""Figures of records whose figures are known by hand."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.measure.engines.figures import figures
from penstock.measure.engines.page import page, sentences, text_table
from penstock.measure.records import Arm, Header, Mark, Record, Request, Sample

S = 1_000_000_000


def header() -> Header:
    works = [
        {
            "kind": "latency",
            "stage": "one",
            "num_requests": 2,
            "concurrency": 1,
            "num_in": 200,
            "num_out": 10,
        },
        {
            "kind": "throughput",
            "stage": "many",
            "num_requests": 2,
            "concurrency": 2,
            "num_in": 0,
            "num_out": 0,
        },
    ]
    return Header(
        run_id="r",
        kind="engines",
        started_at="",
        version="0",
        settings={"works": works, "num_rounds": 2},
        arms=[Arm(name="a", target="a"), Arm(name="b", target="b")],
    )


def started(arm: str, round_: int, t_s: float, total_s: float) -> Mark:
    facts: dict[str, Any] = {
        "round": round_,
        "startup": {"port_s": total_s - 1, "total_s": total_s},
        "limits": ["no usage"],
    }
    return Mark(t_ns=int(t_s * S), arm=arm, name="started", facts=facts)


def request(arm: str, stage: str, round_: int, sent: float, ttft: float, **more: Any) -> Request:
    """An answer of 5 tokens, one each `ttft` seconds."""
    times = [int((sent + ttft * number) * S) for number in range(1, 6)]
    fields: dict[str, Any] = {
        "n_in": 100,
        "n_out": 5,
        "chunk_n": [1] * 5,
        "count_source": "usage",
        "details": {"asked_out": 5},
    }
    return Request(
        arm=arm,
        stage=stage,
        block=round_,
        t_sent_ns=int(sent * S),
        t_first_ns=times[0],
        t_last_ns=times[-1],
        t_done_ns=times[-1],
        chunk_t_ns=times,
        **(fields | more),
    )


def records() -> list[Record]:
    return [
        started("a", 0, 0, 2.0),
        Sample(t_ns=1, arm="a", source="proc", values={"rss_bytes": 10.0, "hwm_bytes": 30.0}),
        Sample(t_ns=2, arm="a", source="proc", values={"rss_bytes": 20.0, "hwm_bytes": 30.0}),
        Sample(t_ns=60 * S, arm="b", source="client", values={"loop_lag_s": 0.5}),
        request("a", "one", 0, 10, 0.1),
        request("a", "one", 0, 20, 0.3),
        request("a", "one", 0, 30, 9.0, phase="warmup"),
        request("a", "many", 0, 40, 0.2),
        request("a", "many", 0, 40.5, 0.5, n_cached=40),
        started("b", 0, 50, 4.0),
        request("b", "one", 0, 60, 0.4),
        Mark(t_ns=70 * S, arm="b", name="ended", facts={"round": 0}),
        started("b", 1, 100, 6.0),
        request("b", "one", 1, 110, 0.2, n_out=4, chunk_n=[1] * 4),
        Request(arm="b", stage="one", block=1, error_class="timeout", error="no answer"),
        Mark(t_ns=120 * S, arm="b", name="ended", facts={"round": 1}),
        started("a", 1, 150, 2.0),
        request("a", "one", 1, 160, 0.1),
        Mark(t_ns=200 * S, arm="a", stage="many", name="failed",
             facts={"round": 1, "reason": "It died.\nhint: see its log"}),
    ]  # fmt: skip


def cell(made: dict[str, Any], stage: str, figure: str, arm: str) -> dict[str, Any]:
    (row,) = [row for row in made["rows"] if (row["stage"], row["figure"]) == (stage, figure)]
    found: dict[str, Any] = row["arms"][arm]
    return found


def test_figures_are_medians_over_rounds() -> None:
    made, _ = figures(header(), records())
    ttft = cell(made, "one", "ttft_s", "a")
    # Round 0: median of 0.1 and 0.3; round 1: 0.1.
    assert ttft["rounds"] == {"0": pytest.approx(0.2), "1": pytest.approx(0.1)}
    assert ttft["median"] == pytest.approx(0.15)
    assert ttft["ratio"] == pytest.approx(1)
    ratio = cell(made, "one", "ttft_s", "b")["ratio"]
    assert ratio == pytest.approx((0.4 / 0.2 + 0.2 / 0.1) / 2)
    speed = cell(made, "one", "prefill_tokens_per_s", "a")["rounds"]
    assert speed["0"] == pytest.approx((100 / 0.1 + 100 / 0.3) / 2)
    assert cell(made, "one", "tpot_s", "b")["rounds"]["0"] == pytest.approx(0.4)
    assert cell(made, "one", "decode_tokens_per_s", "b")["rounds"]["0"] == pytest.approx(2.5)
    assert cell(made, "startup", "total_s", "b")["median"] == pytest.approx(5)
    assert cell(made, "startup", "total_s", "b")["ratio"] == pytest.approx((4 / 2 + 6 / 2) / 2)


def test_throughput_is_from_the_first_sent_to_the_last_answer() -> None:
    made, _ = figures(header(), records())
    # Sent at 40 and 40.5; done at 41 and 43: 3 s, 10 tokens out, 200 in.
    assert cell(made, "many", "output_tokens_per_s", "a")["median"] == pytest.approx(10 / 3)
    assert cell(made, "many", "total_tokens_per_s", "a")["median"] == pytest.approx(210 / 3)
    assert cell(made, "many", "requests_per_s", "a")["median"] == pytest.approx(2 / 3)
    assert cell(made, "many", "ttft_s", "a")["median"] == pytest.approx(0.35)
    assert cell(made, "many", "num_failed", "a")["median"] == 0


def test_memory_is_that_of_the_round() -> None:
    made, _ = figures(header(), records())
    assert cell(made, "memory", "started_rss_bytes", "a")["rounds"] == {"0": 10.0}
    assert cell(made, "memory", "peak_rss_bytes", "a")["rounds"] == {"0": 20.0}
    assert cell(made, "memory", "hwm_bytes", "a")["rounds"] == {"0": 30.0}


def test_what_is_not_the_same_work_is_told() -> None:
    made, problems = figures(header(), records())
    assert problems == [
        "a failed in round 2 (many): It died.",
        "a: tokens of prompts came from a prefix cache.",
        "b: 1 of 3 requests have no whole answer; the first (timeout): no answer",
        "b: 1 of 3 answers are not as long as asked: the work was not the same; figures per "
        "token stand.",
        "b: the client stood still for 0.5 s (allowed: 0.25 s): its times are late by as much.",
    ]
    assert cell(made, "one", "num_failed", "b")["rounds"] == {"0": 0, "1": 1}
    assert made["arms"]["a"]["failed"][0]["reason"].endswith("see its log")


def test_a_run_that_was_killed_between_rounds_is_not_valid() -> None:
    kept = [one for one in records() if getattr(one, "facts", {}).get("round") != 1]
    problems = figures(header(), kept)[1]
    assert "b: the run was interrupted, with 1 of 2 rounds ended." in problems
    assert "a: the run was interrupted, with 0 of 2 rounds ended." in problems


def test_the_page_and_the_table_show_every_arm() -> None:
    made, _ = figures(header(), records())
    html = page(header(), made, records())
    assert html == page(header(), made, records())
    for text in ("This run is not valid.", "It died.", "no usage", "prefill_tokens_per_s"):
        assert text in html
    lines = text_table(made).splitlines()
    assert lines[0].split() == ["a", "b"]
    (told,) = [line for line in lines if line.startswith("startup  total_s")]
    assert told.split() == ["startup", "total_s", "2.00", "s", "5.00", "s", "(2.50x)"]
    assert "a failed (many): It died." in lines
    first, second = sentences(made, {"one": "latency", "many": "throughput"})
    assert first.startswith("a: first answer after 2.00 s; first token in ")
    assert second.startswith("b: first answer after 5.00 s (2.50 times that of a); ")
    assert second.replace("'", "&#x27;") in html


def test_a_machine_that_was_busy_is_told() -> None:
    busy = header()
    load = {"busy_cores": 0.9, "busiest": [{"name": "cc1", "cores": 0.9}]}
    busy.environment = {"load": load, "cpu": {"num_usable_cores": 2}}
    made, problems = figures(busy, records())
    (note,) = made["notes"]
    assert "other processes used 0.9 of 2 cores (cc1 0.9)" in note
    assert note not in problems
    assert note in page(busy, made, records())
    assert f"- {note}" in text_table(made)
    assert figures(header(), records())[0]["notes"] == []


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Start-up of a: 1, 2, 10 s; of b: 2, 2, 30 s. Ratios 2, 1, 3; of the medians it would be 1."""
    found: list[Record] = []
    for round_, (a_s, b_s) in enumerate([(1.0, 2.0), (2.0, 2.0), (10.0, 30.0)]):
        found += [started("a", round_, 100 * round_, a_s), started("b", round_, 50, b_s)]
    made, _ = figures(header(), found)
    told = cell(made, "startup", "total_s", "b")
    assert (told["median"], told["ratio"]) == (2.0, 2.0)


def test_a_prefill_is_of_the_tokens_that_were_not_cached() -> None:
    found = [started("a", 0, 0, 2.0), request("a", "one", 0, 10, 0.5, n_cached=60)]
    made, _ = figures(header(), found)
    assert cell(made, "one", "prefill_tokens_per_s", "a")["median"] == pytest.approx(80.0)

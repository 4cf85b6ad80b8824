"""The driver against a target in this process: who is asked when, and that nobody is lost."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import pytest
from fake_target import FakeTarget, asks, writer_at

from penstock.measure import metrics
from penstock.measure.load import notes
from penstock.measure.load.alarm import Alarm
from penstock.measure.load.driver import Loaded, Windows, closed_loop, open_loop, warm_up
from penstock.measure.load.figures import load_figures
from penstock.measure.load.target import Ask, Reply
from penstock.measure.records import Mark, Record, Request, Sample
from penstock.measure.run import Run

pytestmark = pytest.mark.anyio


def by_index(loaded: Loaded) -> list[Request]:
    return sorted(loaded.rows, key=lambda row: row.index)


async def test_an_open_loop_does_not_wait_for_answers(tmp_path: Path) -> None:
    """20 requests of 0.3 s each, due within 0.1 s: all of them fly at once."""
    target = FakeTarget(answer_s=0.3)
    due_s = [n / 200 for n in range(20)]
    with writer_at(tmp_path) as writer:
        loaded = await open_loop(target, asks(20), due_s, writer=writer, stage="s")
    assert target.most_in_flight == 20
    rows = by_index(loaded)
    zero_ns = rows[0].t_due_ns or 0
    offsets = [((row.t_due_ns or 0) - zero_ns) / 1e9 for row in rows]
    assert offsets == pytest.approx(due_s, abs=1e-8)  # the schedule, not what became of it
    assert all((metrics.queue_s(row) or 0) >= 0 for row in rows)
    assert [row.prompt_id for row in rows] == [f"p{n}" for n in range(20)]
    assert {row.phase for row in rows} == {"steady"}


async def test_phases_go_by_the_due_time(tmp_path: Path) -> None:
    due_s = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    windows = Windows(ramp_s=0.1, steady_s=0.1)
    with writer_at(tmp_path) as writer:
        loaded = await open_loop(FakeTarget(), asks(6), due_s, writer=writer, windows=windows)
    assert [row.phase for row in by_index(loaded)] == ["ramp"] * 2 + ["steady"] * 2 + ["drain"] * 2
    marks = {mark.name: mark for mark in loaded.marks}
    begin_ns = marks["stage_begin"].t_ns
    assert marks["steady_begin"].t_ns - begin_ns == 100_000_000
    assert marks["steady_end"].t_ns - begin_ns == 200_000_000
    assert marks["stage_end"].facts == {"interrupted": False}


async def test_the_window_is_as_long_as_it_was_said_to_be(tmp_path: Path) -> None:
    with writer_at(tmp_path) as writer:
        loaded = await open_loop(
            FakeTarget(), asks(1), [0.0], writer=writer, windows=Windows(steady_s=0.2)
        )
        assert writer.clock.now_ns() >= loaded.marks[0].t_ns + 200_000_000


async def test_a_limit_of_concurrency_is_a_wait_that_is_told(tmp_path: Path) -> None:
    target = FakeTarget(answer_s=0.1)
    with writer_at(tmp_path) as writer:
        loaded = await open_loop(
            target, asks(6), [0.0] * 6, writer=writer, max_concurrency=2, windows=Windows()
        )
    assert target.most_in_flight == 2
    rows = by_index(loaded)
    assert ["cap_wait_s" in row.details for row in rows] == [False] * 2 + [True] * 4
    for row in rows[4:]:
        assert row.details["cap_wait_s"] >= 0.19
        assert (metrics.queue_s(row) or 0) >= 0.19
        assert (metrics.e2e_from_due_s(row) or 0) >= 0.29
        assert (metrics.e2e_s(row) or 0) < (metrics.e2e_from_due_s(row) or 0) - 0.18
    figures = load_figures(loaded.rows, loaded.marks)
    assert any(
        "limit of 2 requests at a time held back 4 of 6" in note for note in figures["notes"]
    )
    late_s = notes._late_s(loaded.rows)
    assert late_s is not None
    assert late_s < 0.08  # with the wait it would be 0.1


async def test_answers_that_do_not_come_in_time_are_cut(tmp_path: Path) -> None:
    target = FakeTarget(answer_s=30, max_running=1)
    with writer_at(tmp_path / "run") as writer:
        loaded = await open_loop(
            target,
            asks(4),
            [0.0] * 4,
            writer=writer,
            windows=Windows(drain_s=0.1),
            max_concurrency=3,
        )
    assert [row.error_class for row in by_index(loaded)] == ["cut"] * 4
    assert [row.t_sent_ns is None for row in by_index(loaded)] == [False] * 3 + [True]
    assert all(row.t_done_ns and row.prompt_id and row.prompt_hash for row in loaded.rows)
    assert len(Run(tmp_path / "run").requests) == 4
    figures = load_figures(loaded.rows, loaded.marks)
    assert (figures["requests"]["num_cut"], figures["requests"]["num_errors"]) == (4, 0)


async def test_an_interrupted_run_leaves_a_row_for_whatever_was_due(tmp_path: Path) -> None:
    due_s = [0.0, 0.0, 0.0, 50.0]
    third = asyncio.Event()

    def error(number: int) -> str | None:
        if number == 3:
            third.set()
        return "connect" if number == 2 else None

    target = FakeTarget(answer_s=20, error=error)
    with writer_at(tmp_path / "run") as writer:
        task = asyncio.create_task(open_loop(target, asks(4), due_s, writer=writer))
        await third.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    run = Run(tmp_path / "run")
    assert sorted(str(row.error_class) for row in run.requests) == ["connect", "cut", "cut"]
    last = run.records[-1]
    assert isinstance(last, Mark)
    assert (last.name, last.facts) == ("stage_end", {"interrupted": True})
    figures = load_figures(run.requests, [one for one in run.records if isinstance(one, Mark)])
    assert "interrupted" in figures["problems"][0]


@pytest.mark.parametrize("moment", [1, 2, 5])
async def test_nobody_is_lost_whenever_the_run_is_interrupted(tmp_path: Path, moment: int) -> None:
    """Cut by the first, second, ... request that is asked: whoever was due by then is a row."""
    stop: list[asyncio.Task[Loaded]] = []

    def interrupt(number: int) -> None:
        if number == moment:
            stop[0].cancel()

    target = FakeTarget(answer_s=20, error=interrupt)
    with writer_at(tmp_path / "run") as writer:
        stop.append(asyncio.create_task(open_loop(target, asks(50), [0.0] * 50, writer=writer)))
        with pytest.raises(asyncio.CancelledError):
            await stop[0]
    rows = Run(tmp_path / "run").requests
    assert sorted(row.index for row in rows) == list(range(len(rows)))
    assert len(rows) == len(target.asked) >= moment
    assert {row.error_class for row in rows} == {"cut"}


async def test_a_closed_loop_keeps_its_clients_busy(tmp_path: Path) -> None:
    target = FakeTarget(answer_s=0.02)
    with writer_at(tmp_path) as writer:
        loaded = await closed_loop(target, asks(30), concurrency=5, writer=writer)
    assert target.most_in_flight == 5
    assert sorted(row.index for row in loaded.rows) == list(range(30))
    assert all((metrics.queue_s(row) or 0) < 0.02 for row in loaded.rows)
    marks = {mark.name: mark.t_ns for mark in loaded.marks}
    assert marks["steady_end"] == max(row.t_due_ns or 0 for row in loaded.rows)


async def test_a_closed_loop_ends_in_time_and_starts_its_clients_in_turn(tmp_path: Path) -> None:
    target = FakeTarget(answer_s=0.01)
    windows = Windows(ramp_s=0.2, steady_s=0.2)
    with writer_at(tmp_path) as writer:
        loaded = await closed_loop(
            target, asks(1000), concurrency=4, writer=writer, windows=windows
        )
    begin_ns = loaded.marks[0].t_ns
    dues = sorted((row.t_due_ns or 0) - begin_ns for row in loaded.rows)
    assert dues[-1] < 400_000_000
    early = [row for row in loaded.rows if (row.t_due_ns or 0) - begin_ns < 100_000_000]
    assert len(early) < len(loaded.rows) / 4  # two clients at most
    for row in loaded.rows:
        in_ramp = (row.t_due_ns or 0) - begin_ns < 200_000_000
        assert row.phase == ("ramp" if in_ramp else "steady")


async def test_a_closed_loop_pauses_after_errors(tmp_path: Path) -> None:
    target = FakeTarget(error=lambda number: "connect")
    with writer_at(tmp_path) as writer:
        loaded = await closed_loop(
            target, asks(10_000), concurrency=2, writer=writer, windows=Windows(steady_s=0.35)
        )
    assert 2 <= len(loaded.rows) <= 8
    assert {row.error_class for row in loaded.rows} == {"connect"}


async def test_callers_set_and_add_what_they_know(tmp_path: Path) -> None:
    def prepare(row: Request) -> None:
        row.arm, row.block = "b", 3

    def finish(ask: Ask, row: Request, reply: Reply | None) -> None:
        assert reply is not None
        row.scores = {"words": float(len(reply.text.split()))}

    with writer_at(tmp_path / "run") as writer:
        loaded = await closed_loop(
            FakeTarget(),
            asks(2),
            concurrency=1,
            writer=writer,
            prepare=prepare,
            finish=finish,
            facts={"rate": 4.0},
        )
    rows = Run(tmp_path / "run").requests
    assert [(row.arm, row.block, row.scores) for row in rows] == [("b", 3, {"words": 4.0})] * 2
    assert {mark.arm for mark in loaded.marks} == {"b"}
    assert (loaded.marks[0].facts["block"], loaded.marks[0].facts["rate"]) == (3, 4.0)


async def test_an_error_of_a_caller_is_not_swallowed(tmp_path: Path) -> None:
    def finish(ask: Ask, row: Request, reply: Reply | None) -> None:
        raise ZeroDivisionError

    with writer_at(tmp_path / "run") as writer, pytest.raises(ZeroDivisionError):
        await open_loop(FakeTarget(), asks(1), [0.0], writer=writer, finish=finish)
    assert len(Run(tmp_path / "run").requests) == 1


async def test_warm_up_is_kept_apart(tmp_path: Path) -> None:
    with writer_at(tmp_path) as writer:
        rows = await warm_up(FakeTarget(), asks(3), writer=writer)
    assert [(row.phase, row.stage) for row in rows] == [("warmup", "warmup")] * 3


async def test_a_client_that_is_late_makes_the_run_invalid(tmp_path: Path) -> None:
    """Each request takes 30 ms of the client's own time, at 50 a second: it cannot keep up."""
    due_s = [n / 50 for n in range(25)]
    with writer_at(tmp_path / "run") as writer:
        loaded = await open_loop(
            FakeTarget(blocks_s=0.03),
            asks(25),
            due_s,
            writer=writer,
            facts={"rate": 50.0},
            windows=Windows(steady_s=0.5),
        )
    records = Run(tmp_path / "run").records
    figures = load_figures(loaded.rows, loaded.marks, meters=records)
    late, rate = figures["problems"][:2]
    assert "The client was late" in late
    assert "scheduled requests a second were sent" in rate
    assert figures["rate"]["scheduled_per_s"] == pytest.approx(50)
    assert figures["rate"]["achieved_per_s"] < 0.9 * 50


async def test_a_client_that_keeps_up_is_not_accused(tmp_path: Path) -> None:
    due_s = [n / 50 for n in range(25)]
    with writer_at(tmp_path) as writer:
        loaded = await open_loop(
            FakeTarget(), asks(25), due_s, writer=writer, windows=Windows(steady_s=1.0)
        )
    figures = load_figures(loaded.rows, loaded.marks)
    assert figures["rate"]["achieved_per_s"] == pytest.approx(25)
    assert not [told for told in figures["problems"] if "scheduled" in told]


async def test_the_client_watches_itself(tmp_path: Path) -> None:
    with writer_at(tmp_path / "run") as writer:
        loaded = await open_loop(
            FakeTarget(blocks_s=0.3),
            asks(1),
            [0.2],
            writer=writer,
            windows=Windows(steady_s=1.2),
        )
    records = Run(tmp_path / "run").records
    samples = [one for one in records if isinstance(one, Sample) and one.source == "client"]
    assert max(sample.values["loop_lag_s"] for sample in samples) >= 0.25
    figures = load_figures(loaded.rows, loaded.marks, meters=records)
    assert any("stood still" in problem for problem in figures["problems"])


async def test_an_alarm_wakes_in_time_and_gives_up_when_cancelled() -> None:
    alarm = Alarm()
    late_ms = []
    for _ in range(40):
        at_ns = time.perf_counter_ns() + 3_300_000
        await alarm.until(at_ns)
        late_ms.append((time.perf_counter_ns() - at_ns) / 1e6)
    assert 0 <= min(late_ms) < 0.6  # a timer of whole milliseconds would be 0.7 late at best
    waiting = asyncio.create_task(alarm.until(time.perf_counter_ns() + 10**10))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await alarm.until(time.perf_counter_ns() - 5)
    alarm.close()


async def test_a_load_that_ends_before_its_time_ends_its_window(tmp_path: Path) -> None:
    """Ten requests by two clients take 0.1 s: the other 30 s are no time of load."""
    windows = Windows(steady_s=30.0)
    target = FakeTarget(answer_s=0.02)
    with writer_at(tmp_path) as writer:
        loaded = await closed_loop(target, asks(10), concurrency=2, writer=writer, windows=windows)
    window_s = load_figures(loaded.rows, loaded.marks)["window"]["duration_s"]
    assert 0.08 <= window_s < 2


async def test_a_request_is_never_due_before_the_load_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timers of a loop may be early; without a ramp, the first requests were lost to it."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay_s: sleep(delay_s / 2))
    with writer_at(tmp_path) as writer:
        loaded = await closed_loop(FakeTarget(), asks(4), concurrency=4, writer=writer)
    assert {row.phase for row in loaded.rows} == {"steady"}


async def test_the_loop_is_watched_to_the_end_of_a_short_stage(tmp_path: Path) -> None:
    target = FakeTarget(blocks_s=0.06)
    with writer_at(tmp_path / "run") as writer:
        await closed_loop(target, asks(2), concurrency=1, writer=writer)
    samples = [one for one in Run(tmp_path / "run").records if isinstance(one, Sample)]
    assert max(sample.values["loop_lag_s"] for sample in samples) >= 0.04


@pytest.mark.parametrize("loop", ["open", "closed"])
async def test_what_cannot_be_written_ends_the_load_at_once(tmp_path: Path, loop: str) -> None:
    def finish(ask: Ask, row: Request, reply: Reply | None) -> None:
        raise OSError("No space left on device")

    begin_s = time.monotonic()
    with writer_at(tmp_path) as writer:
        target, windows = FakeTarget(answer_s=0.1), Windows(steady_s=10)
        more: dict[str, Any] = {"writer": writer, "windows": windows, "finish": finish}
        if loop == "open":
            load = open_loop(target, asks(200), [n / 20 for n in range(200)], **more)
        else:
            load = closed_loop(target, asks(200), concurrency=3, **more)
        with pytest.raises(OSError, match="No space"):
            await load
    assert time.monotonic() - begin_s < 5
    assert gc.isenabled()


async def test_garbage_is_collected_again_also_where_a_stage_cannot_begin_or_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer_at(tmp_path) as writer:
        add = writer.add
        for failing in ("stage_begin", "stage_end"):

            def refuse(record: Record, failing: str = failing) -> None:
                if isinstance(record, Mark) and record.name == failing:
                    raise OSError("No space left on device")
                add(record)

            monkeypatch.setattr(writer, "add", refuse)
            with pytest.raises(OSError, match="No space"):
                await closed_loop(FakeTarget(), asks(1), concurrency=1, writer=writer)
            assert gc.isenabled()


async def test_nothing_is_collected_while_a_stage_lasts(tmp_path: Path) -> None:
    collects: list[bool] = []

    def look(number: int) -> None:
        collects.append(gc.isenabled())

    with writer_at(tmp_path) as writer:
        await closed_loop(FakeTarget(error=look), asks(3), concurrency=1, writer=writer)
    assert collects == [False] * 3
    assert gc.isenabled()

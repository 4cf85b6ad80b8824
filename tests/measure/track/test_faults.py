"""What goes wrong while a tracker runs for weeks: nothing of it is lost, or counted as good."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from tracked_world import START, FakeTarget, World, config_of, figures_of

from penstock.cli.track import leaderboard
from penstock.measure.kinds import compute, finish
from penstock.measure.load.target import Ask, Reply
from penstock.measure.records import Clock, Request
from penstock.measure.results.headline import headline
from penstock.measure.track import service
from penstock.measure.track.config import Model, Provider
from penstock.measure.track.export import export, header_of, records_of
from penstock.measure.track.figures import FORMULAS, drift_summary, figures
from penstock.measure.track.page import page
from penstock.measure.track.probe import CANARIES
from penstock.measure.track.tables import SLOTS


def test_who_cannot_be_reached_is_not_available(world: World) -> None:
    asyncio.run(world.tracker().run(num_slots=1))
    world.unreachable = {"p/b"}
    asyncio.run(world.tracker().run(num_slots=3))
    series = figures_of(world)["series"]
    assert series["p/a"]["availability"] == 1
    assert series["p/b"]["availability"] == 0.25
    assert series["p/b"]["cells"][0]["availability"] == 0.25
    assert series["p/b"]["reasons"] == {"`p/b` does not answer.": 3}


def test_who_never_answers_is_in_the_leaderboard(world: World) -> None:
    world.unreachable = {"p/b"}
    asyncio.run(world.tracker().run(num_slots=2))
    made = figures_of(world)
    assert made["series"]["p/b"]["cells"] == []
    line = next(line for line in leaderboard(made) if line.startswith("p/b"))
    assert line.split()[-2:] == ["0.0%", "-"]
    header, records = header_of(world.config, 0), records_of(world.config, world.book, 0)
    speed = page(header, made, records).split("Over time</h2>")[0]
    row = speed.split(">p/b</th>")[1].split("</tr>")[0]
    assert ">0 %<" in row
    assert [one.value for one in headline("track", made) if "p/b" in one.title] == [0]


def test_a_series_in_time_is_of_one_cell(world: World) -> None:
    asyncio.run(world.tracker().run(num_slots=2))
    one = figures_of(world)["series"]["p/a"]
    shapes = {
        (point["input_tokens"], point["output_tokens"], point["concurrency"])
        for point in one["by_slot"]
    }
    assert len(shapes) == len(one["cells"]) > 1
    assert len(one["by_slot"]) == 2 * len(shapes)
    assert sum(point["n"] for point in one["by_slot"]) == sum(
        cell["num_ok"] + sum(cell["errors"].values()) for cell in one["cells"]
    )


def test_what_the_figures_mean_is_the_same_everywhere() -> None:
    docs = (Path(__file__).parents[3] / "docs/measure/track.md").read_text(encoding="utf-8")
    for formula in FORMULAS.values():
        assert formula in docs


def test_no_drift_is_told_only_of_what_was_tested() -> None:
    def drift(series: str, p_value: float | None, alarm: bool = False) -> dict[str, Any]:
        what = {"series": series, "what": "answers", "reference": "r"}
        return {**what, "p_value": p_value, "alarm": alarm}

    assert "not enough slots yet" in drift_summary([drift("a", None)])
    assert drift_summary([drift("a", 0.5)]) == "No series has drifted from its reference."
    assert drift_summary([drift("a", 0.5), drift("b", None)]).endswith("tell of b.")
    assert drift_summary([drift("a", 0.0, True)]) == "1 alarm: answers of a differ from r."


def test_chunks_are_no_tokens() -> None:
    def speed(source: str) -> Any:
        row = Request(
            arm="p/a", stage="1", task="speed", t_sent_ns=0, t_done_ns=10**9, n_out=5,
            details={"input_tokens": 1, "output_tokens": 20, "concurrency": 1},
        )  # fmt: skip
        row.count_source = source  # type: ignore[assignment]
        found = figures(header_of(config_of(), 0), [row])[0]["series"]["p/a"]["cells"][0]
        return found["tokens_per_s"]["p50"], found["measured_output_tokens"]

    assert speed("usage") == (5.0, 5)
    assert speed("chunks") == (None, None)


def test_a_missed_slot_may_still_be_probed_and_no_other(world: World) -> None:
    """Who starts a second tracker says of all series that the first has not come to: missed."""
    world.book.miss(["p/a", "p/b"], [START], "asleep")
    slot_id = world.book.open_slot("p/a", START, {"region": "x"})
    assert slot_id is not None
    world.book.miss(["p/a"], [START], "asleep")
    assert world.book.open_slot("p/a", START, {}) is None
    world.book.close_slot(slot_id, "done")
    world.book.miss(["p/a"], [START], "asleep")
    assert world.book.open_slot("p/a", START, {}) is None
    slots = {slot.series: slot for slot in world.book.slots()}
    assert (slots["p/a"].state, slots["p/a"].reason) == ("done", None)
    assert slots["p/a"].facts == {"region": "x"}
    assert slots["p/b"].state == "missed"


def test_the_database_fails_for_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    add, close = world.book.add, world.book.close_slot
    fails = {"add": 3, "close": 1}

    def failing(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if fails[name]:
                fails[name] -= 1
                raise OperationalError("INSERT secret", {}, Exception("disk full"))
            function(*arguments)

        return call

    monkeypatch.setattr(world.book, "add", failing("add", add))
    monkeypatch.setattr(world.book, "close_slot", failing("close", close))
    asyncio.run(world.tracker().run(num_slots=3))
    (line,) = [line for line in world.said if "database" in line]
    assert "disk full" in line
    assert "secret" not in line
    states = [state for name in ("p/a", "p/b", "q/a") for _, state in world.states(name)]
    assert states.count("interrupted") == 1
    assert states.count("done") == 6


def test_a_fault_is_told_and_the_tracker_goes_on(world: World) -> None:
    def answer(ask: Ask) -> str:
        raise ValueError("no such thing")

    world.answer = answer
    asyncio.run(world.tracker().run(num_slots=2))
    assert world.states("p/a") == [(1, "interrupted"), (2, "interrupted")]
    assert world.book.slots()[0].reason == "ValueError: no such thing"


def test_the_clock_is_set_back(world: World) -> None:
    world.wall.now_s = START + 86400
    tracker = world.tracker()
    asyncio.run(tracker.run(num_slots=1))
    slept_from_s = world.wall.now_s = START + 0.5
    asyncio.run(tracker.run(num_slots=2))
    assert world.wall.now_s - slept_from_s < 130


def test_the_clock_is_set_back_while_it_runs(world: World) -> None:
    back = count()

    def set_back(line: str) -> None:
        if "done" in line and next(back) == 2:
            world.wall.now_s -= 86400

    tracker = world.tracker()
    tracker._say = set_back
    asyncio.run(tracker.run(num_slots=2))
    assert world.states("p/a") == [(1 - 1440 + 1, "done"), (1, "done")]


def test_a_long_sleep_leaves_so_many_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_MISSED", 5)
    asyncio.run(world.tracker().run(num_slots=1))
    world.wall.now_s += 20 * 60 + 30
    asyncio.run(world.tracker().run(num_slots=1))
    assert [number for number, state in world.states("p/a") if state == "missed"] == [
        17, 18, 19, 20, 21,
    ]  # fmt: skip
    assert sum("15 slots more were missed" in line for line in world.said) == 3


def test_who_is_still_alive(world: World) -> None:
    now, me = time.time(), os.getpid()

    def begin(number: int, host: str, pid: int, started_s: float) -> None:
        monkey = world.book._who
        world.book._who = lambda: {"host": host, "pid": pid}  # type: ignore[method-assign]
        world.book.open_slot("p/a", START + 60 * number, {})
        world.book._who = monkey  # type: ignore[method-assign]
        with world.book._engine.begin() as connection:
            mine = SLOTS.c.scheduled_at == START + 60 * number
            connection.execute(SLOTS.update().where(mine).values(started_at=started_s))

    begin(0, "elsewhere", 1, now - 2 * 86400)  # given up
    begin(1, "elsewhere", 1, now - 60)
    begin(2, world.book._host, os.getppid(), now)
    begin(3, world.book._host, os.getppid(), now - 20 * 365 * 86400)  # its id is another one's now
    begin(4, world.book._host, me, now)  # left by this process
    world.tracker().settle()
    states = dict(world.states("p/a"))
    assert {number: states[number] for number in range(5)} == {
        0: "interrupted", 1: "running", 2: "running", 3: "interrupted", 4: "interrupted",
    }  # fmt: skip


def test_the_reference_is_older_than_what_is_shown(world: World) -> None:
    world.config.alarm.window_slots, world.config.alarm.reference_slots = 2, 3
    world.failing = {"p/b"}
    asyncio.run(world.tracker().run(num_slots=2))
    world.failing = set()
    asyncio.run(world.tracker().run(num_slots=6))
    since = START + 7 * 60
    records = records_of(world.config, world.book, since)
    figures_, _ = compute(header_of(world.config, since), records)
    assert figures_["series"]["p/a"]["slots"] == {"done": 2}
    assert figures_["series"]["p/a"]["num_ok"] == 2 * (1 + 8 + 8 * 3)
    used = {
        name: sorted({(int(row.stage) - START) // 60 for row in records
                      if isinstance(row, Request) and row.arm == name and int(row.stage) < since})
        for name in ("p/a", "p/b")
    }  # fmt: skip
    assert used == {"p/a": [1, 2, 3], "p/b": [3, 4, 5]}  # the first that were answered
    for drift in figures_["drift"]:
        num = len(CANARIES) * (1 if drift["what"] == "answers" else 2)
        if drift["what"] == "answers":
            assert (drift["num_reference"], drift["num_window"]) == (3 * num, 2 * num)


def test_other_canaries_are_no_drift(world: World, tmp_path: Path) -> None:
    asyncio.run(world.tracker().run(num_slots=5))
    world.config.probe.canaries = str(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("\n".join(f"Question {n}?" for n in range(8)))
    world.answer = lambda ask: "something else"
    asyncio.run(world.tracker().run(num_slots=2))
    drifts = figures_of(world)["drift"]
    assert [drift["p_value"] for drift in drifts] == [None] * 6


def test_what_the_end_cuts_off_is_a_row(world: World) -> None:
    class Hanging(FakeTarget):
        async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
            if ask.prompt_id.startswith("canary"):
                row.error_class = "cut"
                raise asyncio.CancelledError
            return await super().ask(ask, row, clock)

    async def connect(provider: Provider, model: Model, timeout_s: float) -> Hanging:
        return Hanging(model.name, world.answer, False)

    tracker = world.tracker()
    tracker._connect = connect
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(tracker.run(num_slots=1))
    rows = [row for _, row in world.book.requests()]
    assert [row.error_class for row in rows] == [None] * 9 + ["cut"]
    assert [slot.state for slot in world.book.slots()] == ["interrupted"]
    assert figures_of(world)["series"][rows[0].arm]["availability"] == 1


def test_who_reads_does_not_stop_who_writes(world: World) -> None:
    slot_id = world.book.open_slot("p/a", START, {})
    assert slot_id is not None
    for number in range(3):
        world.book.add(slot_id, Request(prompt_id=str(number)))
    reader = world.book.requests()
    assert next(reader)[1].prompt_id == "0"
    begin_s = time.monotonic()
    world.book.add(slot_id, Request(prompt_id="3"))
    assert time.monotonic() - begin_s < 5
    assert [row.prompt_id for _, row in reader] == ["1", "2"]  # as it was when reading began


def test_keys_in_addresses_are_not_exported(world: World) -> None:
    world.config.provider[0].url = "https://example.com/v1?key=hunter2&version=3"
    (first, *_) = header_of(world.config, START).arms
    assert first.target == "https://example.com/v1?key=***&version=3"


def test_the_page_says_why_there_is_nothing(world: World, tmp_path: Path) -> None:
    world.unreachable, world.failing = {"p/b"}, {"q/a"}
    asyncio.run(world.tracker().run(num_slots=2))
    finish(export(world.config, world.book, START, tmp_path / "run"))
    page = (tmp_path / "run/report.html").read_text()
    assert "2 slots: `p/b` does not answer." in page
    assert "http_429 66" in page
    assert "of 2 requests only" in page

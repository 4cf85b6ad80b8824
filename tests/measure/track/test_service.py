"""A tracker with targets that answer at once: slots, missed ones, restarts, figures."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from pathlib import Path

import pytest
from tracked_world import START, World, config_of

from penstock.measure.kinds import compute, finish
from penstock.measure.records import Request
from penstock.measure.run import Run
from penstock.measure.track.export import export, header_of, records_of
from penstock.measure.track.probe import CANARIES, speed_asks


def test_slots_and_figures(world: World) -> None:
    world.failing = {"q/a"}
    asyncio.run(world.tracker().run(num_slots=2))
    assert world.states("p/a") == [(1, "done"), (2, "done")]
    assert not any(target.is_open for target in world.targets)
    assert len(world.targets) == 6

    figures, problems = compute(
        header_of(world.config, START), records_of(world.config, world.book, START)
    )
    assert problems == []
    series = figures["series"]["p/a"]
    assert series["slots"] == {"done": 2}
    assert [(cell["input_tokens"], cell["concurrency"]) for cell in series["cells"]] == [
        (50, 1),
        (50, 3),
        (200, 1),
        (200, 3),
    ]
    cell = series["cells"][1]
    assert cell["ttft_s"] == {"n": 6, "p50": 0.25, "p90": 0.25, "p99": 0.25}
    assert cell["tokens_per_s"] == {"n": 6, "p50": 16.0, "p10": 16.0}
    assert cell["decode_tokens_per_s"]["p50"] == pytest.approx(19.0)
    # 60 fresh tokens at $1, 40 cached at $0.5 and 20 at $2, for 20 tokens
    assert cell["usd_per_1m_output_tokens"] == pytest.approx(120 / 20)

    limited = figures["series"]["q/a"]
    assert limited["num_ok"] == 0
    assert limited["availability"] is None
    assert limited["num_rate_limited"] == 2 * (1 + 8 + 8 * 3)
    assert limited["errors"] == {"http_429": limited["num_rate_limited"]}
    assert limited["cells"][0]["ttft_s"]["p50"] is None


def test_prompts_are_new_and_the_same_for_all(world: World) -> None:
    asyncio.run(world.tracker().run(num_slots=2))
    speed = {
        (target.arm.model, number): [
            ask.messages for ask in target.asked if ask.prompt_id.count("/") == 3
        ]
        for number, target in enumerate(world.targets)
    }
    first = [messages for (_, number), messages in speed.items() if number < 3]
    second = [messages for (_, number), messages in speed.items() if number >= 3]
    assert first[0] == first[1] == first[2]
    texts = [message["content"] for messages in first[0] + second[0] for message in messages or ()]
    assert len(texts) == len(set(texts)) == 16


def test_lengths_of_prompts() -> None:
    short, long = (speed_asks(1, num, 10, "x")[0].messages for num in (100, 2000))
    assert short is not None
    assert long is not None
    words = len(long[0]["content"].split()) - len(short[0]["content"].split())
    assert words == pytest.approx(1900 / 1.35, abs=2)


def test_nobody_answers(world: World) -> None:
    world.unreachable = {"p/b"}
    asyncio.run(world.tracker().run(num_slots=1))
    (slot,) = [slot for slot in world.book.slots() if slot.series == "p/b"]
    assert (slot.state, slot.reason) == ("failed", "`p/b` does not answer.")
    assert world.states("p/a") == [(1, "done")]


def test_missed_while_nobody_ran(world: World) -> None:
    asyncio.run(world.tracker().run(num_slots=1))
    world.wall.now_s = START + 5 * 60 + 30
    asyncio.run(world.tracker().run(num_slots=1))
    assert world.states("p/a") == [
        (1, "done"),
        *[(number, "missed") for number in (2, 3, 4, 5)],
        (6, "done"),
    ]
    missed = [slot for slot in world.book.slots() if slot.state == "missed"]
    assert {slot.reason for slot in missed} == {"no tracker probed it"}
    assert len(missed) == 12


def test_missed_while_busy(world: World) -> None:
    world.wall.per_slot_s = 50.0  # three series: 150 s of a schedule of 60 s
    asyncio.run(world.tracker().run(num_slots=2))
    assert world.states("q/a") == [(1, "done"), (2, "missed"), (3, "done")]
    (missed,) = [s for s in world.book.slots() if s.series == "q/a" and s.state == "missed"]
    assert missed.reason == "the tracker was busy or asleep"


def test_interrupted(world: World) -> None:
    slot_id = world.book.open_slot("p/a", START - 60, {})
    assert slot_id is not None
    world.book.add(slot_id, Request(arm="p/a", task="speed", t_done_ns=1))
    world.tracker().settle()
    assert world.states("p/a")[0] == (-1, "interrupted")
    assert len(list(world.book.requests())) == 1


def test_two_trackers(world: World) -> None:
    asyncio.run(world.tracker().slot(START))
    asyncio.run(world.tracker().slot(START))
    assert world.states("p/a") == [(0, "done")]
    assert len(world.targets) == 3
    assert sum("another tracker" in line for line in world.said) == 3


def test_drift_alarm(world: World) -> None:
    numbers = count()
    world.config = config_of(first_token_samples=20)
    del world.config.provider[1:], world.config.provider[0].model[1:]
    world.config.alarm.window_slots = 3
    world.config.alarm.reference_slots = 3
    world.answer = lambda ask: "abc"[next(numbers) % 3] if ask.max_tokens == 1 else "same"
    asyncio.run(world.tracker().run(num_slots=6))

    def alarms() -> list[tuple[str, str]]:
        header = header_of(world.config, START)
        figures, _ = compute(header, records_of(world.config, world.book, START))
        return [(d["series"], d["what"]) for d in figures["drift"] if d["alarm"]]

    assert alarms() == []
    world.answer = lambda ask: "acc"[next(numbers) % 3] if ask.max_tokens == 1 else "other"
    asyncio.run(world.tracker().run(num_slots=3))
    assert alarms() == [("p/a", "first tokens"), ("p/a", "answers")]
    said = [line for line in world.said if line.startswith("ALARM")]
    assert sorted(said) == [
        "ALARM: answers of p/a differ from its own first slots",
        "ALARM: first tokens of p/a differ from its own first slots",
    ]


def test_reference_is_another_series(world: World) -> None:
    world.config.provider[1].model[0].reference = "p/a"
    asyncio.run(world.tracker().run(num_slots=2))
    figures, _ = compute(
        header_of(world.config, START), records_of(world.config, world.book, START)
    )
    drifts = {(d["series"], d["what"]): d for d in figures["drift"]}
    assert drifts["q/a", "answers"]["reference"] == "p/a"
    # One false alarm a year, of two tests of three series in every minute of it.
    assert drifts["q/a", "answers"]["alpha"] == pytest.approx(1 / (365.25 * 1440 * 2 * 3))
    assert drifts["q/a", "answers"]["num_reference"] == 2 * len(CANARIES)
    assert drifts["p/a", "answers"]["num_reference"] == 0  # all its slots are in the window


def test_export_can_be_verified(world: World, tmp_path: Path) -> None:
    asyncio.run(world.tracker().run(num_slots=2))
    path = export(world.config, world.book, START, tmp_path / "run")
    made = finish(path)
    run = Run(path)
    assert compute(run.header, run.records) == (made.figures, made.problems)
    assert made.num_records == 6 + 6 * (1 + 8 + 8 * 3)
    assert "p/a" in (path / "report.html").read_text()


def test_time_goes_on(world: World) -> None:
    """The tracker waits by the clock on the wall, in small steps: it may be set."""
    begin_s = time.monotonic()
    asyncio.run(world.tracker().run(num_slots=3))
    assert time.monotonic() - begin_s < 30
    assert world.wall.now_s == START + 180

"""A tracker with targets that answer at once: slots, missed ones, restarts, figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.measure.kinds import compute, finish
from penstock.measure.load.target import Ask, Reply, identify
from penstock.measure.records import Arm, Clock, Request
from penstock.measure.run import Run
from penstock.measure.track import service
from penstock.measure.track.config import Config, Model, Provider
from penstock.measure.track.export import export, header_of, records_of
from penstock.measure.track.probe import CANARIES, speed_asks
from penstock.measure.track.service import Tracker
from penstock.measure.track.tables import Book
from penstock.storage.database import open_database

START = 1_800_000_000  # a multiple of 60


class FakeTarget:
    """Answers at once; the answer is a function of the model and the question."""

    def __init__(self, model: str, answer: Callable[[Ask], str], fails: bool) -> None:
        self.arm = Arm(name=model, target="fake", model=model)
        self.limits: list[str] = []
        self.asked: list[Ask] = []
        self.is_open = True
        self._answer, self._fails = answer, fails

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        identify(row, ask, self.arm)
        self.asked.append(ask)
        row.t_sent_ns = row.t_due_ns
        await asyncio.sleep(0)
        row.t_done_ns = clock.now_ns()
        if self._fails:
            row.http_status, row.error_class, row.error = 429, "http_429", "slow down"
            return None
        assert row.t_due_ns is not None
        row.t_first_ns = row.t_first_visible_ns = row.t_due_ns + 250_000_000
        row.t_last_ns = row.t_done_ns = row.t_due_ns + 1_250_000_000
        row.n_in, row.n_cached, row.n_out = 100, 40, ask.max_tokens
        row.count_source = "usage"
        return Reply(text=self._answer(ask))

    async def close(self) -> None:
        self.is_open = False


class Wall:
    """The clock on the wall, which sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = float(START)
        self.per_slot_s = 0.0  # how long a slot takes

        async def sleep(seconds: float) -> None:
            self.now_s += seconds

        monkeypatch.setattr(service, "_LONGEST_SLEEP_S", 7.0)
        monkeypatch.setattr(service.asyncio, "sleep", sleep)

    def __call__(self) -> float:
        return self.now_s


def config_of(**probe: Any) -> Config:
    told = {
        "schedule": {"every": "60s"},
        "provider": [
            {"name": "p", "url": "http://127.0.0.1:1", "model": [{"name": "a"}, {"name": "b"}]},
            {"name": "q", "url": "http://127.0.0.1:1", "model": [{"name": "a"}]},
        ],
        "probe": {
            "input_tokens": [50, 200],
            "output_tokens": [20],
            "concurrency": [1, 3],
            "pause_s": 0,
            "first_token_samples": 2,
        }
        | probe,
        "alarm": {"window_slots": 2, "reference_slots": 3},
    }
    return msgspec.convert(told, Config)


class World:
    """Targets, a database and a clock."""

    def __init__(self, url: str, wall: Wall, config: Config) -> None:
        self.wall, self.config = wall, config
        self.book = Book(open_database(url))
        self.targets: list[FakeTarget] = []
        self.failing: set[str] = set()
        self.unreachable: set[str] = set()
        self.said: list[str] = []
        self.answer: Callable[[Ask], str] = lambda ask: ask.prompt_id

    def tracker(self) -> Tracker:
        async def connect(provider: Provider, model: Model, timeout_s: float) -> FakeTarget:
            assert timeout_s == 120.0
            self.wall.now_s += self.wall.per_slot_s
            name = f"{provider.name}/{model.name}"
            if name in self.unreachable:
                raise ConfigError(f"`{name}` does not answer.")
            self.targets.append(FakeTarget(name, self.answer, name in self.failing))
            return self.targets[-1]

        price = {
            "provider": "p",
            "model": "a",
            "usd_in_per_million": 1.0,
            "usd_cached_in_per_million": 0.5,
            "usd_out_per_million": 2.0,
            "source": "test",
        }
        return Tracker(
            self.config,
            self.book,
            price_facts=lambda provider, model: {"price": price} if provider.name == "p" else {},
            connect=connect,
            say=self.said.append,
            now=self.wall,
        )

    def states(self, series: str) -> list[tuple[int, str]]:
        return [
            ((slot.scheduled_at - START) // 60, slot.state)
            for slot in self.book.slots()
            if slot.series == series
        ]


@pytest.fixture
def world(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(database_url, Wall(monkeypatch), config_of())
    yield world
    world.book.close()


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
    world.config = config_of(first_token_samples=40)
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
    assert set(alarms()) == {
        (series, what) for series in ("p/a", "p/b", "q/a") for what in ("first tokens", "answers")
    }


def test_reference_is_another_series(world: World) -> None:
    world.config.provider[1].model[0].reference = "p/a"
    asyncio.run(world.tracker().run(num_slots=2))
    figures, _ = compute(
        header_of(world.config, START), records_of(world.config, world.book, START)
    )
    drifts = {(d["series"], d["what"]): d for d in figures["drift"]}
    assert drifts["q/a", "answers"]["reference"] == "p/a"
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

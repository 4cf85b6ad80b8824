"""A tracker's world for tests: targets that answer at once, a database, and a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.measure.kinds import compute
from penstock.measure.load.target import Ask, Reply, identify
from penstock.measure.records import Arm, Clock, Request
from penstock.measure.track import service
from penstock.measure.track.config import Config, Model, Provider
from penstock.measure.track.export import alarms, header_of, records_of
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
            alarms=lambda: alarms(self.config, self.book, self.wall()),
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


def figures_of(world: World, since: int = START) -> dict[str, Any]:
    found, _ = compute(header_of(world.config, since), records_of(world.config, world.book, since))
    return found

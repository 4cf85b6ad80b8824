"""Both arms while they are asked: quality in turns, the base against itself, interleaved load.

Owns the order of things and what is written about them; the design says who answers when. Quality
is asked with natural ends, load with a fixed length: an arm that rambles is not faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.engines.arms import ArmSpec
from penstock.measure.engines.launcher import Running
from penstock.measure.load import arrivals, driver
from penstock.measure.load.target import Ask, Reply
from penstock.measure.load.words import Lengths, synthetic
from penstock.measure.meters import prices
from penstock.measure.meters.price_lists import Price
from penstock.measure.meters.sampler import Sampler, measure_idle
from penstock.measure.quality.runner import run_task
from penstock.measure.quality.tasks import Item, Task
from penstock.measure.records import Clock, Record, Request
from penstock.measure.run import Run, Writer
from penstock.measure.verdict import design, speed
from penstock.measure.verdict.arms import Arms
from penstock.measure.verdict.divergence_run import conversations, divergence_windows, is_possible
from penstock.measure.verdict.figures import Comparison
from penstock.measure.verdict.plan import DIVERGENCE, DONE, QUALITY, REPEAT
from penstock.measure.verdict.settings import LoadSettings

Progress = Callable[[str], None]
TELL_S = 4.0  # between two lines of progress within a part


@dataclass
class _Tagged:
    """A sink that says in each row which part of the comparison it belongs to."""

    writer: Writer
    clock: Clock
    stage: str
    role: int
    price: Price | None

    def add(self, record: Record) -> None:
        if isinstance(record, Request):
            record.stage = self.stage
            record.details = record.details | {"role": self.role, "slot": 0}
            if self.price is not None:
                prices.set_cost(record, self.price)
        self.writer.add(record)


@dataclass(frozen=True)
class _Part:
    """Some items of a task, as a task."""

    task: Task
    some: list[Item]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def items(self, limit: int | None = None, seed: int = 0) -> list[Item]:
        return self.some

    def grade(self, item: Item, reply: Reply) -> dict[str, float]:
        return self.task.grade(item, reply)


class Session:
    """Both arms while they are measured."""

    def __init__(
        self,
        writer: Writer,
        arms: Arms,
        tasks: Sequence[Task],
        asked: dict[str, list[Item]],
        load: LoadSettings,
        price_of: dict[str, Price],
        progress: Progress,
    ) -> None:
        self._writer, self._arms, self._load = writer, arms, load
        self._tasks, self._asked = tasks, asked
        self._price_of, self._progress = price_of, progress
        self._told_s = -math.inf
        self._sampler: Sampler | None = None

    async def measure(self, interval_s: float) -> None:
        """All that is asked of the arms."""
        async with Sampler(self._writer, self._arms.up(), interval_s=interval_s) as sampler:
            self._sampler = sampler
            if self._load.idle:
                self._progress(f"resting for {self._load.idle:g} s")
                await measure_idle(sampler, self._load.idle)
            if self._tasks:
                await self._quality()
            if self._load.blocks:
                await self._speed()

    def _tell(self, line: str) -> None:
        """Progress within a part, now and then."""
        if time.monotonic() - self._told_s >= TELL_S:
            self._told_s = time.monotonic()
            self._progress(line)

    async def _running(self, role: int) -> Running:
        """An arm that is up and whose processes are read."""
        before = self._arms.up()
        running = await self._arms.get(role)
        assert self._sampler is not None
        for name in before.keys() - self._arms.up().keys():
            self._sampler.remove(name)
        for name, pid in self._arms.up().items():
            if name not in before:
                self._sampler.add(name, pid)
        return running

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Meters are read at both ends of a leg, so that its energy is not interpolated."""
        assert self._sampler is not None
        self._sampler.read()
        try:
            yield
        finally:
            self._sampler.read()

    async def _quality(self) -> None:
        """Every item of both arms, chunk by chunk, who begins in turn; then of the base again."""
        items = [(task, item) for task in self._tasks for item in self._asked[task.name]]
        parts = design.chunks(items, self._load.chunks, self._load.seed)
        for number, part in enumerate(parts):
            for role in (0, 1) if number % 2 == 0 else (1, 0):
                told = f"quality: part {number + 1} of {len(parts)}"
                await self._graded(QUALITY, role, part, number, told)
        self._writer.mark(DONE, stage=QUALITY)
        await self._graded(REPEAT, 0, items, 0, "quality: the base again")
        self._writer.mark(DONE, stage=REPEAT)

    async def _graded(
        self, stage: str, role: int, items: Sequence[tuple[Task, Item]], block: int, told: str
    ) -> None:
        running = await self._running(role)
        name = running.arm.name
        num_answers = 0

        def on_row(row: Request) -> None:
            nonlocal num_answers
            num_answers += 1
            self._tell(f"{told}, {name}: {num_answers:,} of {len(items):,} answers")

        sink = _Tagged(self._writer, self._writer.clock, stage, role, self._price_of.get(name))
        with self._read():
            for task in self._tasks:
                some = [item for owner, item in items if owner is task]
                if some:
                    await run_task(
                        running.target,
                        _Part(task, some),
                        writer=sink,
                        arm=name,
                        block=block,
                        seed=self._load.seed,
                        concurrency=self._load.clients,
                        keep_questions=stage == QUALITY and role == 0,
                        on_row=on_row,
                    )

    async def _speed(self) -> None:
        """The base against itself, then both, until it can be told or all blocks are done."""
        load = self._load
        for block in range(load.noise_blocks):
            self._progress(f"noise floor: block {block + 1} of {load.noise_blocks}")
            for leg in design.legs(block, load.seed):
                await self._leg(speed.NOISE, 0, leg, block, load.noise_blocks)
        if load.noise_blocks:
            self._writer.mark(DONE, stage=speed.NOISE)
        done = 0
        for look in load.looks:
            for block in range(done, look):
                self._progress(f"speed: block {block + 1} of {look}")
                for leg in design.legs(block, load.seed):
                    await self._leg(speed.SPEED, leg.role, leg, block, look)
            done = look
            if self._verdict_on_speed() != "cannot tell":
                break
        self._writer.mark(DONE, stage=speed.SPEED)

    def _verdict_on_speed(self) -> str:
        made = Comparison(self._writer.header, Run(self._writer.path).records).axes()
        return made["speed"].verdict if "speed" in made else "cannot tell"

    async def _leg(self, stage: str, arm: int, leg: design.Leg, block: int, of: int) -> None:
        """One arm under load; `leg.role` is the side of the pair, which may be the base's twice."""
        load = self._load
        running = await self._running(arm)
        lap = f"{load.seed}-{stage}-{block}-{leg.part}" + (
            f"-{leg.role}" if stage == speed.NOISE else ""
        )
        asks = self._asks(block, leg.part, f"{lap}-w")[: load.num_warmups]
        await driver.warm_up(running.target, asks, writer=self._writer, concurrency=load.clients)
        num_sent = 0

        def prepare(row: Request) -> None:
            nonlocal num_sent
            num_sent += 1
            self._tell(
                f"{stage}: block {block + 1} of {of}, leg {leg.slot + 1} of 4: request {num_sent} "
                f"of {load.requests}"
            )
            row.block = block
            row.arm = running.arm.name
            row.details = {"role": leg.role, "slot": leg.slot}

        asks = self._asks(block, leg.part, lap)
        with self._read():
            if load.request_rate is None:
                await driver.closed_loop(
                    running.target,
                    asks,
                    concurrency=load.clients,
                    writer=self._writer,
                    stage=stage,
                    prepare=prepare,
                )
            else:
                due_s = arrivals.due_times(
                    arrivals.steady(load.request_rate),
                    seed=1_000_003 * load.seed + 2 * block + leg.part,
                    num=len(asks),
                )
                await driver.open_loop(
                    running.target,
                    asks,
                    due_s,
                    writer=self._writer,
                    stage=stage,
                    prepare=prepare,
                )

    def _asks(self, block: int, part: int, nonce: str) -> list[Ask]:
        """Prompts of a part of a block: the same for both arms, and new to every cache."""
        load = self._load
        pool = [item.ask for task in self._tasks for item in self._asked[task.name]]
        if load.random_input_len is not None or not pool:
            num_in = load.random_input_len or 256
            return synthetic(
                load.requests,
                input_tokens=Lengths(num_in, num_in),
                output_tokens=Lengths(load.random_output_len, load.random_output_len),
                seed=nonce,
            )
        chosen = design.prompts_of(pool, block, part, load.requests, load.seed)
        return [
            design.fresh(ask, f"{nonce}-{index}", load.random_output_len)
            for index, ask in enumerate(chosen)
        ]

    async def divergence(self, specs: tuple[ArmSpec, ArmSpec]) -> None:
        """Where both are one model on our engine, compare distributions over the base's answers."""
        most, num_done = self._load.divergence_tokens, 0
        if not most or not is_possible(specs):
            return
        texts = conversations(Run(self._writer.path).requests, self._asked)
        try:
            async for facts in divergence_windows(specs, texts, most):
                num_done = facts.pop("num_done")
                self._tell(f"divergence: {num_done:,} of at most {most:,} tokens")
                self._writer.mark(DIVERGENCE, **facts)
        except ConfigError as error:  # no axis of the verdict rests on it: it stands without
            self._writer.mark("limit", arm="both arms", message=error.message)
            self._progress(error.message)
        else:
            self._progress(f"divergence: {num_done:,} tokens were compared")
        self._writer.mark(DONE, stage=DIVERGENCE)

"""Runs a comparison: quality in turns, the base against itself, interleaved load, divergence.

Owns the order of things and what is written about them; the design says who answers when, and
`figures` what it means. Quality is asked with natural ends, load with a fixed length: an arm that
rambles is not faster.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.engines.arms import URL, ArmSpec
from penstock.measure.engines.launcher import Running
from penstock.measure.engines.workload import model_directory
from penstock.measure.environment import hash_directory
from penstock.measure.load import arrivals, driver
from penstock.measure.load.target import Ask, Reply
from penstock.measure.load.words import Lengths, synthetic
from penstock.measure.meters import prices
from penstock.measure.meters import settings as meter_options
from penstock.measure.meters.price_lists import Price
from penstock.measure.meters.sampler import Sampler, measure_idle
from penstock.measure.quality.runner import run_task
from penstock.measure.quality.tasks import Item, Task, TaskFacts
from penstock.measure.records import Arm, Clock, Record, Request
from penstock.measure.run import Figures, Run, Writer, new_header
from penstock.measure.verdict import design, speed
from penstock.measure.verdict.arms import Arms
from penstock.measure.verdict.divergence_run import conversations, divergence_windows
from penstock.measure.verdict.figures import QUALITY, REPEAT, Comparison
from penstock.measure.verdict.rule import Rule
from penstock.measure.verdict.settings import LoadSettings, RuleSettings

Progress = Callable[[str], None]


def run(
    specs: tuple[ArmSpec, ArmSpec],
    tasks: Sequence[Task],
    *,
    load: LoadSettings,
    rules: RuleSettings,
    meters: meter_options.MeterSettings,
    directory: Path | None = None,
    api_key: str | None = None,
    hashes: dict[str, str] | None = None,
    progress: Progress = lambda line: None,
) -> tuple[Path, Figures]:
    """Compare two arms and write the run. Returns its directory and the figures.

    Args:
        hashes: SHA-256 of the user's files, by path.

    Raises:
        ConfigError: a setting is wrong, or an arm cannot be had.
        EngineFailed: an arm died.
    """
    load.check()
    rule = rules.rule(len(load.looks))
    if not tasks and not load.blocks:
        raise ConfigError(
            "There is nothing to compare: no task and no block.",
            hint="--tasks, --prompts, --blocks",
        )
    path = asyncio.run(_run(specs, tasks, load, rule, meters, directory, api_key, hashes, progress))
    return path, kinds.finish(path)


async def _run(
    specs: tuple[ArmSpec, ArmSpec],
    tasks: Sequence[Task],
    load: LoadSettings,
    rule: Rule,
    meters: meter_options.MeterSettings,
    directory: Path | None,
    api_key: str | None,
    hashes: dict[str, str] | None,
    progress: Progress,
) -> Path:
    asked = {task.name: task.items(load.limit, load.seed) for task in tasks}
    with tempfile.TemporaryDirectory(prefix="penstock-compare-") as logs:
        specs = (_speaking(specs[0]), _speaking(specs[1]))
        arms = Arms(specs, log_dir=Path(logs), residency=load.residency, api_key=api_key)
        async with arms:
            progress("starting both arms")
            both = await arms.start()
            header = new_header(
                "compare",
                settings=_settings(tasks, asked, load, rule, meters, arms.residency),
                arms=[_hashed(running) for running in both],
                hashes=hashes or {},
            )
            price_of = _prices(both, specs, meters)
            header.prices = {name: msgspec.to_builtins(price) for name, price in price_of.items()}
            with Writer(header, directory) as writer:
                for running in both:
                    for limit in running.target.limits:
                        writer.mark("limit", arm=running.arm.name, message=limit)
                session = _Session(writer, arms, tasks, asked, load, price_of, progress)
                await session.measure(meters.meter_interval)
                await arms.close()
                await session.divergence(specs)
                return writer.path


def _hashed(running: Running) -> Arm:
    """The arm, with the hash of its model's files if they are here."""
    directory = model_directory(running.spec)
    if directory is not None:
        running.arm.hashes["model"] = hash_directory(directory)
    return running.arm


def _speaking(spec: ArmSpec) -> ArmSpec:
    """An arm that may be asked messages and texts alike, unless the user names a dialect."""
    if not spec.is_started or spec.options.get("dialect"):
        return spec
    return replace(spec, options={**spec.options, "dialect": "auto"})


def _settings(
    tasks: Sequence[Task],
    asked: dict[str, list[Item]],
    load: LoadSettings,
    rule: Rule,
    meters: meter_options.MeterSettings,
    residency: str,
) -> dict[str, Any]:
    facts: dict[str, TaskFacts] = {task.name: task.facts(len(asked[task.name])) for task in tasks}
    return {
        "rule": msgspec.to_builtins(rule),
        "load": asdict(load) | {"residency": residency},
        "seed": load.seed,
        "tasks": msgspec.to_builtins(facts),
        **meter_options.prepare(meters),
    }


def _prices(
    both: Sequence[Running], specs: Sequence[ArmSpec], meters: meter_options.MeterSettings
) -> dict[str, Price]:
    """Prices of tokens, for arms of providers that have one."""
    found = {}
    for running, spec in zip(both, specs, strict=True):
        if spec.kind != URL:
            continue
        arm = running.arm
        arm.provider = arm.provider or prices.provider_of(spec.location)
        price = meter_options.load_prices(meters).find(arm.provider, arm.model)
        if isinstance(price, Price):
            found[arm.name] = price
    return found


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


class _Session:
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
        self._sampler: Sampler | None = None

    async def measure(self, interval_s: float) -> None:
        """All that is asked of the arms."""
        async with Sampler(self._writer, self._arms.up(), interval_s=interval_s) as sampler:
            self._sampler = sampler
            if self._load.idle_s:
                self._progress(f"resting for {self._load.idle_s:g} s")
                await measure_idle(sampler, self._load.idle_s)
            if self._tasks:
                await self._quality()
            if self._load.blocks:
                await self._speed()

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
            self._progress(f"quality: part {number + 1} of {len(parts)}")
            for role in (0, 1) if number % 2 == 0 else (1, 0):
                await self._graded(QUALITY, role, part, number)
        self._progress("quality: the base again")
        await self._graded(REPEAT, 0, items, 0)

    async def _graded(
        self, stage: str, role: int, items: Sequence[tuple[Task, Item]], block: int
    ) -> None:
        running = await self._running(role)
        name = running.arm.name
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
                        concurrency=self._load.concurrency,
                    )

    async def _speed(self) -> None:
        """The base against itself, then both, until it can be told or all blocks are done."""
        load = self._load
        for block in range(load.noise_blocks):
            self._progress(f"noise floor: block {block + 1} of {load.noise_blocks}")
            for leg in design.legs(block, load.seed):
                await self._leg(speed.NOISE, 0, leg, block, load.noise_blocks)
        done = 0
        for look in load.looks:
            for block in range(done, look):
                self._progress(f"speed: block {block + 1} of {look}")
                for leg in design.legs(block, load.seed):
                    await self._leg(speed.SPEED, leg.role, leg, block, look)
            done = look
            if self._verdict_on_speed() != "cannot tell":
                break

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
        asks = self._asks(block, leg.part, f"{lap}-w")[: load.warmup]
        await driver.warm_up(
            running.target, asks, writer=self._writer, concurrency=load.concurrency
        )

        def prepare(row: Request) -> None:
            row.block = block
            row.arm = running.arm.name
            row.details = {"role": leg.role, "slot": leg.slot}

        asks = self._asks(block, leg.part, lap)
        with self._read():
            if load.request_rate is None:
                await driver.closed_loop(
                    running.target,
                    asks,
                    concurrency=load.concurrency,
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
        if load.input_tokens is not None or not pool:
            num_in = load.input_tokens or 256
            return synthetic(
                load.requests,
                input_tokens=Lengths(num_in, num_in),
                output_tokens=Lengths(load.output_tokens, load.output_tokens),
                seed=nonce,
            )
        chosen = design.prompts_of(pool, block, part, load.requests, load.seed)
        return [
            design.fresh(ask, f"{nonce}-{index}", load.output_tokens)
            for index, ask in enumerate(chosen)
        ]

    async def divergence(self, specs: tuple[ArmSpec, ArmSpec]) -> None:
        """Where both are one model on our engine, compare distributions over the base's answers."""
        if not self._load.divergence_tokens:
            return
        texts = conversations(Run(self._writer.path).requests, self._asked)
        async for facts in divergence_windows(specs, texts, self._load.divergence_tokens):
            self._progress(f"divergence: {facts.pop('num_done')} tokens")
            self._writer.mark("divergence", **facts)

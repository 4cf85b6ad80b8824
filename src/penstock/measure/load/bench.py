"""A bench from its begin to its last row: warm-up, stages of load, meters, all in one run.

Knows settings, a target that answers, and the store. Figures are made afterwards, of what was
written, so that an interrupted bench has them too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from penstock.measure.load import search
from penstock.measure.load.driver import closed_loop, open_loop, warm_up
from penstock.measure.load.figures import load_figures
from penstock.measure.load.progress import Progress
from penstock.measure.load.search import Point
from penstock.measure.load.target import Ask, Reply, Target
from penstock.measure.load.workload import Workload
from penstock.measure.meters.sampler import Sampler, measure_idle
from penstock.measure.records import Request
from penstock.measure.run import Writer

Price = Callable[[Request], None]  # writes what a request cost into its row


class Meter(NamedTuple):
    """What is read beside the load."""

    interval_s: float = 1.0
    pid: int | None = None  # of the server, where it runs on this machine
    idle_s: float = 0.0  # of rest before the load, to subtract


UNMETERED = Meter(interval_s=0.0)


class Bench:
    """Stages of one workload on one target, written to one run."""

    def __init__(
        self,
        target: Target,
        workload: Workload,
        writer: Writer,
        *,
        meter: Meter = UNMETERED,
        price: Price | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._target, self._workload, self._writer = target, workload, writer
        self._meter, self._price = meter, price
        self._progress = progress or Progress()
        self._limits = workload.settings.limits

    async def serve(self) -> None:
        """One stage: the load of the settings."""
        settings = self._workload.settings
        async with self._meters():
            await self._warm_up()
            point = Point(rate=settings.request_rate)
            if not settings.is_open:
                point = Point(concurrency=settings.clients)
            await self.stage(point, name="load")

    async def sweep(self, points: Sequence[Point]) -> None:
        """A stage for each point, up to saturation."""
        async with self._meters():
            await self._warm_up()
            ended = await search.sweep(points, self.stage)
            self._writer.mark("sweep", ended=ended)

    async def search(self, *, start: float | None, most: float, precision: float) -> None:
        """Stages at rates that close in on the highest within the limits.

        Args:
            start: the first rate; None: what one client alone comes to.
        """
        async with self._meters():
            await self._warm_up()
            if start is None:
                alone = await self.stage(Point(concurrency=1))
                start = alone["rate"]["answered_per_s"] or 1.0
            found = await search.highest_rate(
                self.stage, start=float(f"{start:.3g}"), most=most, precision=precision
            )
            self._writer.mark("search", **msgspec.to_builtins(found))

    async def stage(self, point: Point, name: str | None = None) -> dict[str, Any]:
        """Load the target, and return the figures of it."""
        workload, settings = self._workload, self._workload.settings
        stage = name or point.stage
        if point.concurrency is not None:
            num = settings.num_prompts
            self._progress.begin(stage, num)
            loaded = await closed_loop(
                self._target,
                workload.asks(stage, num),
                concurrency=point.concurrency,
                writer=self._writer,
                stage=stage,
                windows=workload.windows(point),
                finish=self._finish,
            )
        else:
            due_s = workload.due_s(point)
            self._progress.begin(stage, len(due_s))
            loaded = await open_loop(
                self._target,
                workload.asks(stage, len(due_s)),
                due_s,
                writer=self._writer,
                stage=stage,
                windows=workload.windows(point, due_s),
                max_concurrency=settings.max_concurrency,
                facts={} if point.rate is None else {"rate": point.rate},
                finish=self._finish,
            )
        self._progress.clear()
        return load_figures(loaded.rows, loaded.marks, limits=self._limits)

    @asynccontextmanager
    async def _meters(self) -> AsyncIterator[None]:
        """Meters run within, behind a rest that shows what the machine takes anyway."""
        if self._meter.interval_s <= 0:
            yield
            return
        pids = {self._target.arm.name: self._meter.pid}
        async with Sampler(self._writer, pids, interval_s=self._meter.interval_s) as sampler:
            if self._meter.idle_s > 0:
                self._progress.say(f"Idle for {self._meter.idle_s:g} s, to measure it.")
                await measure_idle(sampler, self._meter.idle_s)
            yield

    async def _warm_up(self) -> None:
        """Answer prompts that are not measured, and learn from them how long words are."""
        workload, num = self._workload, self._workload.settings.num_warmups
        if num:
            self._progress.begin("warm-up", num)
            asks = workload.warmup(num)
            rows = await warm_up(self._target, asks, writer=self._writer)
            texts = {ask.prompt_id: ask.prompt for ask in asks}
            pairs = [
                (text, row.n_in)
                for row in rows
                if row.ok and isinstance(text := texts[row.prompt_id], str)
            ]
            if workload.needs_words:
                workload.words = workload.words.refined(pairs)
            self._progress.clear()
        if workload.needs_words:
            facts = workload.words._asdict()
            self._writer.mark("words", **(facts | {"words": len(workload.words.words)}))

    def _finish(self, ask: Ask, row: Request, reply: Reply | None) -> None:
        if ask.fixed_length:
            row.details["asked_out"] = ask.max_tokens
        if self._price is not None:
            self._price(row)
        self._progress.add(row)

"""Sends requests when they are due (open loop) or when a client is free (closed loop).

Owns the schedule in real time, phases, and the rows: each is written when it ends, an error or a
cut like an answer. Knows no wire and no figure.
Invariant: every request that was due before the load ended leaves exactly one row, also when the
run is interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from penstock.measure.load.alarm import Alarm
from penstock.measure.load.target import Ask, Reply, Target, identify
from penstock.measure.records import Mark, Phase, Request, Sample
from penstock.measure.run import Writer

ERROR_PAUSE_S = 0.1  # of a closed-loop client after an error, so that a dead server is not hammered
LEAD_S = 0.02  # between the begin of a stage and its first due time
PROBE_S = 0.02  # how often the event loop is asked whether it is late
SAMPLE_S = 0.5  # how often the worst answer is written down


class Windows(NamedTuple):
    """The parts of a stage, in seconds of its load.

    What is due in the first `ramp_s` is not measured, nor is what is due after `steady_s` more
    (None: until the load ends). When nothing is due any more, answers have `drain_s` to come.
    """

    ramp_s: float = 0.0
    steady_s: float | None = None
    drain_s: float = 60.0


class Loaded(NamedTuple):
    """What a stage left behind; all of it is written already."""

    rows: list[Request]
    marks: list[Mark]


WHOLE = Windows()
Prepare = Callable[[Request], None]  # sets what only the caller knows, such as arm and block
Finish = Callable[[Ask, Request, Reply | None], None]  # may add to the row before it is written


async def open_loop(
    target: Target,
    asks: Iterable[Ask],
    due_s: Sequence[float],
    *,
    writer: Writer,
    stage: str = "",
    windows: Windows = WHOLE,
    max_concurrency: int | None = None,
    facts: dict[str, Any] | None = None,
    prepare: Prepare | None = None,
    finish: Finish | None = None,
) -> Loaded:
    """Send the requests at their due times, whatever the server does.

    Args:
        asks: at least as many as there are due times.
        due_s: seconds from the begin of the stage, ascending.
        max_concurrency: more than this many wait; their wait is in `queue_s` and, apart, in
            `details["cap_wait_s"]`.
        facts: of the stage, kept in its first mark, such as the rate that was asked for.
    """
    run = _Stage(target, writer, stage, windows, prepare, finish)
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    end_s = math.inf if windows.steady_s is None else windows.ramp_s + windows.steady_s
    told = {"loop": "open", "num_due": len(due_s), "max_concurrency": max_concurrency}
    async with run.under_way(told | (facts or {})):
        for index, (ask, at_s) in enumerate(zip(asks, due_s, strict=False)):
            due_ns = run.begin_ns + round(at_s * 1e9)
            await run.until(due_ns)
            phase: Phase = "ramp" if at_s < windows.ramp_s else "steady"
            row = run.row(index, due_ns, "drain" if at_s >= end_s else phase)
            run.spawn(run.ask(ask, row, places))
        if math.isfinite(end_s):  # the window is as long as it was said to be
            await run.until(run.begin_ns + round(end_s * 1e9))
        await run.drain(run.begin_ns + round(end_s * 1e9) if math.isfinite(end_s) else None)
    return Loaded(run.rows, run.marks)


async def closed_loop(
    target: Target,
    asks: Iterable[Ask],
    *,
    concurrency: int,
    writer: Writer,
    stage: str = "",
    windows: Windows = WHOLE,
    facts: dict[str, Any] | None = None,
    prepare: Prepare | None = None,
    finish: Finish | None = None,
) -> Loaded:
    """Keep `concurrency` clients busy, each with one request at a time.

    Ends `ramp_s + steady_s` after the begin, or when `asks` ends; then the window ends at the last
    due time, since clients go idle. They start one after another over `ramp_s`. A request is due
    when its client is free.
    """
    run = _Stage(target, writer, stage, windows, prepare, finish)
    source = enumerate(asks)
    ramp_ns = round(windows.ramp_s * 1e9)
    end_s = math.inf if windows.steady_s is None else windows.ramp_s + windows.steady_s
    last_due_ns = 0
    is_empty = False

    async def client(number: int) -> None:
        nonlocal last_due_ns, is_empty
        begin_ns = run.begin_ns + ramp_ns * number // concurrency
        while (left_ns := begin_ns - writer.clock.now_ns()) > 0:  # noqa: ASYNC110 - early timers
            await asyncio.sleep(left_ns / 1e9)
        while (due_ns := writer.clock.now_ns()) < run.begin_ns + end_s * 1e9:
            found = next(source, None)
            if found is None:
                is_empty = True
                return
            index, ask = found
            last_due_ns, in_ramp = due_ns, due_ns < run.begin_ns + ramp_ns
            row = run.row(index, due_ns, "ramp" if in_ramp else "steady")
            await run.ask(ask, row, None)
            if not row.ok:
                await asyncio.sleep(ERROR_PAUSE_S)

    async with run.under_way({"loop": "closed", "concurrency": concurrency} | (facts or {})):
        clients = [run.spawn(client(number)) for number in range(concurrency)]
        left_s = end_s - (writer.clock.now_ns() - run.begin_ns) / 1e9
        timeout_s = max(0.0, left_s) if math.isfinite(end_s) else None
        await asyncio.wait(clients, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        run.check()
        await run.drain(last_due_ns if is_empty else run.begin_ns + round(end_s * 1e9))
    return Loaded(run.rows, run.marks)


async def warm_up(
    target: Target,
    asks: Iterable[Ask],
    *,
    writer: Writer,
    concurrency: int = 1,
    prepare: Prepare | None = None,
) -> list[Request]:
    """Answer prompts that are not measured: rows of the phase and the stage `warmup`."""

    def mark(row: Request) -> None:
        row.phase = "warmup"
        if prepare is not None:
            prepare(row)

    loaded = await closed_loop(
        target, asks, concurrency=concurrency, writer=writer, stage="warmup", prepare=mark
    )
    return loaded.rows


class _Stage:
    """One load on one target while it lasts: its tasks, its open rows, its marks."""

    def __init__(
        self,
        target: Target,
        writer: Writer,
        stage: str,
        windows: Windows,
        prepare: Prepare | None,
        finish: Finish | None,
    ) -> None:
        self.rows: list[Request] = []
        self.marks: list[Mark] = []
        self.begin_ns = 0
        self._target, self._writer, self._clock = target, writer, writer.clock
        self._windows, self._prepare, self._finish = windows, prepare, finish
        self._like = Request(stage=stage, arm=target.arm.name)  # what all rows have in common
        if prepare is not None:
            prepare(self._like)
        self._tasks: set[asyncio.Task[None]] = set()  # that have not ended
        self._failure: BaseException | None = None
        self._steady_ended = False

    @contextlib.asynccontextmanager
    async def under_way(self, facts: dict[str, Any]) -> AsyncIterator[None]:
        """The stage from its begin to its last row, whatever happens within."""
        with _no_collections():
            self.begin_ns = self._clock.now_ns() + round(LEAD_S * 1e9)
            ramp_ns = round(self._windows.ramp_s * 1e9)
            windows = self._windows._asdict() | {"block": self._like.block}
            self._mark(self.begin_ns, "stage_begin", facts | windows)
            self._mark(self.begin_ns + ramp_ns, "steady_begin")
            self._alarm = Alarm()
            probe = asyncio.create_task(self._probe())
            interrupted = True
            try:
                yield
                interrupted = False
            finally:
                self._alarm.close()
                await self._cut()
                probe.cancel()
                await asyncio.gather(probe, return_exceptions=True)
                if not self._steady_ended:
                    self._mark(self._clock.now_ns(), "steady_end")
                self._mark(self._clock.now_ns(), "stage_end", {"interrupted": interrupted})

    async def until(self, at_ns: int) -> None:
        """Wait for a moment on the clock of the run. What is due already lets others run."""
        await self._alarm.until(at_ns + self._clock.zero_ns)
        self.check()

    def check(self) -> None:
        """Raise what a request raised, such as a full disk, instead of loading on in vain."""
        if self._failure is not None:
            raise self._failure

    def row(self, index: int, due_ns: int, phase: Phase) -> Request:
        """The row of a request that is due."""
        row = Request(
            stage=self._like.stage,
            arm=self._like.arm,
            index=index,
            t_due_ns=due_ns,
            phase=phase,
        )
        if self._prepare is not None:
            self._prepare(row)
        return row

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def ask(self, ask: Ask, row: Request, places: asyncio.Semaphore | None) -> None:
        """Ask, after waiting for one of `places`, and write the row."""
        reply = None
        held = False
        try:
            if places is not None:
                if places.locked():
                    since_ns = self._clock.now_ns()
                    row.details["cap_wait_s"] = 0.0
                    await places.acquire()
                    row.details["cap_wait_s"] = (self._clock.now_ns() - since_ns) / 1e9
                else:
                    await places.acquire()
                held = True
            reply = await self._target.ask(ask, row, self._clock)
        except asyncio.CancelledError:
            row.error_class = "cut"
            raise
        finally:
            if held and places is not None:
                places.release()
            self._end(ask, row, reply)

    async def drain(self, load_end_ns: int | None) -> None:
        """Wait for the answers that are on their way, at most `drain_s`; the rest is cut.

        Args:
            load_end_ns: when the steady window ended; None: now.
        """
        self._mark(self._clock.now_ns() if load_end_ns is None else load_end_ns, "steady_end")
        self._steady_ended = True
        if self._tasks:
            drain_s = self._windows.drain_s
            await asyncio.wait(self._tasks, timeout=drain_s, return_when=asyncio.FIRST_EXCEPTION)
        self.check()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a task, but not its error: one in a caller's function is one of the program."""
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    async def _cut(self) -> None:
        """Cancel what is left. All tasks have begun: they were queued before what cancels them."""
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _end(self, ask: Ask, row: Request, reply: Reply | None) -> None:
        if row.t_done_ns is None:
            row.t_done_ns = self._clock.now_ns()
        if not row.prompt_id:
            identify(row, ask, self._target.arm)
        self.rows.append(row)
        try:
            if self._finish is not None:
                self._finish(ask, row, reply)
        finally:
            self._writer.add(row)

    def _mark(self, at_ns: int, name: str, facts: dict[str, Any] | None = None) -> None:
        like = self._like
        mark = Mark(t_ns=at_ns, name=name, arm=like.arm, stage=like.stage, facts=facts or {})
        self.marks.append(mark)
        self._writer.add(mark)

    async def _probe(self) -> None:
        """Write down how late the event loop is at worst, and how much of a core it uses."""
        while True:
            worst_s, used_s = 0.0, time.process_time()
            since_s = before_s = time.perf_counter()
            try:
                while before_s - since_s < SAMPLE_S:
                    await asyncio.sleep(PROBE_S)
                    now_s = time.perf_counter()
                    worst_s = max(worst_s, now_s - before_s - PROBE_S)
                    before_s = now_s
            finally:  # also when the stage ends
                now_s = time.perf_counter()
                worst_s = max(worst_s, now_s - before_s - PROBE_S)
                share = (time.process_time() - used_s) / max(1e-9, now_s - since_s)
                values = {"loop_lag_s": worst_s, "cpu_share": share}
                at_ns, arm = self._clock.now_ns(), self._like.arm
                self._writer.add(Sample(t_ns=at_ns, arm=arm, source="client", values=values))


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """A collection stops the clock of every stream; a request leaves no cycles to collect."""
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()

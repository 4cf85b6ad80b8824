"""One evaluation from its options to its run: targets, tasks, harness, judge, rows, figures.

Owns the order of things. Everything that can be wrong with tasks and votes is found before a
target is started or asked.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from penstock.errors import PenstockError
from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec, parse_arm, parse_arms
from penstock.measure.engines.launcher import Running, launched
from penstock.measure.load.endpoint import api_key
from penstock.measure.load.target import Ask
from penstock.measure.meters.price_lists import Price
from penstock.measure.meters.prices import NoPrice, Prices, provider_of, set_cost
from penstock.measure.meters.settings import load_prices
from penstock.measure.quality import judge as judging
from penstock.measure.quality import suites
from penstock.measure.quality.options import Options, is_paid
from penstock.measure.quality.planning import facts_of, hashes_of, plan_of, settings_of
from penstock.measure.quality.questions import question_of
from penstock.measure.quality.runner import run_jobs, run_task
from penstock.measure.quality.stopping import Stopping
from penstock.measure.quality.tasks import Task
from penstock.measure.records import Arm, Record, Request
from penstock.measure.run import HEADER, RECORDS, Writer, new_header

KIND = "eval"
PATIENCE_S = 10.0  # between two words on a target that does not answer yet


class Progress(Protocol):
    """What a user sees while it runs."""

    def begin(self, what: str, total: int) -> None:
        """So many rows of something will come."""

    def row(self, row: Request) -> None:
        """A row was written."""

    def say(self, line: str) -> None:
        """Something else happens."""


@dataclass
class _Priced:
    """The writer, which gives each row its cost first, where a price is known."""

    writer: Writer
    prices: Mapping[str, Price | NoPrice]

    def __post_init__(self) -> None:
        self.clock = self.writer.clock
        self.has_rows = False

    def add(self, record: Record) -> None:
        self.has_rows = self.has_rows or isinstance(record, Request)
        if isinstance(record, Request) and record.arm in self.prices:
            set_cost(record, self.prices[record.arm])
        self.writer.add(record)

    def mark(self, name: str, *, arm: str = "", stage: str = "", **facts: Any) -> None:
        self.writer.mark(name, arm=arm, stage=stage, **facts)


class Session:
    """One evaluation. `path` is its run's directory while there is one with rows in it."""

    def __init__(self, options: Options) -> None:
        """Read and check all there is to read; nothing is started or asked.

        Raises:
            ConfigError: a target, a task, a file or an option cannot be used.
        """
        self.path: Path | None = None
        self._options = options
        self._specs = parse_arms(options.targets)
        self._judge_spec = _judge_spec(options, self._specs)
        self._everyone = [spec for spec in (*self._specs, self._judge_spec) if spec is not None]
        options.check(self._specs, self._judge_spec)
        self._keys = (api_key(options.api_key_env), api_key(options.judge_api_key_env))
        for spec in self._everyone:
            if spec.kind == IN_PROCESS:
                _check_engine(spec)
        self._tasks = suites.find_all(
            options.tasks, options.data, num_fewshot=options.num_fewshot, **options.own
        )
        self._plan = plan_of(options)
        self._facts = facts_of(options, self._tasks, self._plan)
        self._votes = judging.read_votes(options.votes) if options.votes else []
        self._prices = load_prices(options.meters) if any(map(is_paid, self._everyone)) else None

    async def run(self, progress: Progress) -> None:
        """Ask, grade, judge; Ctrl-C and SIGTERM end it with the rows that there are.

        Raises:
            PenstockError: a target cannot be started or asked, or the harness failed.
        """
        options, tasks, plan = self._options, self._tasks, self._plan
        with Stopping() as stopping, self._logs() as logs:
            async with AsyncExitStack() as stack:
                running = {}
                for spec in self._specs:
                    if tasks or spec.kind != IN_PROCESS:
                        launching = self._launch(spec, logs, self._keys[0])
                        running[spec.name] = await _patiently(stack, launching, spec.name, progress)
                judge = None
                if self._judge_spec is not None:
                    launching = self._launch(self._judge_spec, logs, self._keys[1])
                    judge = await _patiently(stack, launching, self._judge_spec.name, progress)
                sink = self._begin(stack, running, judge)
                progress.say(f"rows are kept in {self.path}")
                rows = await _ask(options, tasks, running, sink, progress)
                if plan is not None:
                    for spec in self._specs:
                        progress.say(f"{spec.name}: lm-evaluation-harness")
                        if spec.kind == IN_PROCESS and spec.name in running:
                            await running[spec.name].target.close()  # the harness loads its own
                        with stopping.blocking():
                            self._harness(spec, running.get(spec.name), sink)
                if judge is not None:
                    await _judge(options, judge, tasks, rows, self._votes, sink, progress)

    def _begin(
        self, stack: AsyncExitStack, running: Mapping[str, Running], judge: Running | None
    ) -> _Priced:
        """Write the header; rows go to what is returned."""
        arms = [
            running[spec.name].arm if spec.name in running else _arm_of(spec)
            for spec in self._specs
        ]
        everyone = [one for one in (*running.values(), judge) if one is not None]
        prices = {} if self._prices is None else _prices(self._prices, everyone)
        header = new_header(
            KIND,
            settings=settings_of(self._options, self._facts, self._plan, judge),
            arms=arms,
            hashes=hashes_of(self._options),
            prices=msgspec.to_builtins(prices),
        )
        writer = stack.enter_context(Writer(header, self._options.out))
        self.path = writer.path
        self._sink = _Priced(writer, prices)
        return self._sink

    @contextmanager
    def _logs(self) -> Iterator[Path]:
        """Where started engines write: moved beside the rows at the end, if there are any.

        An engine that did not start leaves its log, which its error names, and no run.
        """
        logs = None
        if any(spec.is_started for spec in self._everyone):
            logs = Path(tempfile.mkdtemp(prefix="penstock-eval-"))
        is_named = False
        try:
            yield logs or Path()  # of URLs, nobody writes there
        except PenstockError:
            is_named = True
            raise
        finally:
            if self.path is not None and not self._sink.has_rows:
                _remove_run(self.path)
                self.path = None
            if logs is not None:
                _put_logs(logs, self.path, keep=is_named)

    def _launch(
        self, spec: ArmSpec, logs: Path, key: str | None
    ) -> AbstractAsyncContextManager[Running]:
        if spec.is_started:  # asked in chat or in plain text, as a task wants
            spec = replace(spec, options={"dialect": "auto", **spec.options})
        timeout_s = self._options.timeout_s
        return launched(
            spec,
            log_dir=logs,
            api_key=key if spec.kind == URL else None,
            timeout_s=timeout_s,
            request_timeout_s=timeout_s,
        )

    def _harness(self, spec: ArmSpec, running: Running | None, sink: _Priced) -> None:
        """Blocks the event loop: some of lm-eval's graders need the main thread for alarms."""
        from penstock.measure.quality.harness.run import run_harness

        options = self._options
        assert self._plan is not None
        if spec.kind == IN_PROCESS:
            from penstock.measure.offline import config_of
            from penstock.measure.quality.harness import inprocess

            config = config_of(spec.location, spec.options)
            names = [name.replace("-", "_") for name in spec.options]
            access = inprocess.load(
                spec.location, **{name: getattr(config, name) for name in names}
            )
        else:
            from penstock.measure.quality.harness import http

            assert running is not None
            access = http.connect(
                running.url,
                model=running.arm.model or None,
                api_key=self._keys[0] if spec.kind == URL else None,
                chat=options.chat,
                num_concurrent=options.concurrency,
                timeout_s=options.timeout_s,
            )
        try:
            is_first = spec is self._specs[0]
            run_harness(access, self._plan, writer=sink, arm=spec.name, keep_questions=is_first)
        finally:
            access.close()


async def _patiently(
    stack: AsyncExitStack,
    launching: AbstractAsyncContextManager[Running],
    name: str,
    progress: Progress,
) -> Running:
    """Wait until a target answers, and say now and then that it does not yet."""
    progress.say(f"{name}: getting ready")
    started_s = time.monotonic()

    async def tell() -> None:
        while True:
            await asyncio.sleep(PATIENCE_S)
            progress.say(f"{name}: no answer yet, {time.monotonic() - started_s:.0f} s")

    telling = asyncio.create_task(tell())
    try:
        return await stack.enter_async_context(launching)
    finally:
        telling.cancel()


def _put_logs(logs: Path, run: Path | None, *, keep: bool) -> None:
    """Beside the rows; where there is no run, they stay only if an error has named them."""
    has_logs = any(logs.iterdir())
    if run is not None and has_logs:
        shutil.copytree(logs, run / "logs", dirs_exist_ok=True)
    if run is not None or not (keep and has_logs):
        shutil.rmtree(logs)


def _remove_run(path: Path) -> None:
    """Of a run in which nothing was measured; what else lies in its directory stays."""
    for name in (HEADER, RECORDS):
        (path / name).unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def _check_engine(spec: ArmSpec) -> None:
    from penstock.measure.offline import config_of

    config_of(spec.location, spec.options)


def _judge_spec(options: Options, specs: Sequence[ArmSpec]) -> ArmSpec | None:
    if options.judge is None:
        return None
    spec = parse_arm(options.judge)
    if spec.name in {other.name for other in specs}:
        spec = replace(spec, name=f"judge {spec.name}")
    return spec


def _arm_of(spec: ArmSpec) -> Arm:
    """An engine that only the harness loads, in this process."""
    flags = [f"{name}={value}" for name, value in spec.options.items()]
    return Arm(
        name=spec.name, target=spec.text, model=spec.location, engine="penstock", flags=flags
    )


def _prices(lists: Prices, running: Sequence[Running]) -> dict[str, Price | NoPrice]:
    """By arm, for those at a provider's URL."""
    providers = {
        one.arm.name: provider_of(one.url) or one.arm.provider for one in running if one.url
    }
    return {
        one.arm.name: lists.find(providers[one.arm.name], one.arm.model)
        for one in running
        if providers.get(one.arm.name)
    }


async def _ask(
    options: Options,
    tasks: Sequence[Task],
    running: Mapping[str, Running],
    sink: _Priced,
    progress: Progress,
) -> dict[str, list[Request]]:
    """The rows of every arm."""
    change: Callable[[Ask], Ask] | None = None
    if options.temperature is not None:
        temperature = options.temperature

        def change(ask: Ask) -> Ask:
            return msgspec.structs.replace(ask, temperature=temperature)

    rows: dict[str, list[Request]] = {}
    for name, one in running.items():
        is_first = not rows
        rows[name] = []
        for task in tasks:
            num_items = len(task.items(options.limit, options.seed))
            progress.begin(f"{name}: {task.name}", num_items * options.repeats)
            rows[name] += await run_task(
                one.target,
                task,
                writer=sink,
                arm=name,
                limit=options.limit,
                seed=options.seed,
                concurrency=options.concurrency,
                repeats=options.repeats,
                keep_questions=is_first,
                change=change,
                on_row=progress.row,
            )
    return rows


async def _judge(
    options: Options,
    judge: Running,
    tasks: Sequence[Task],
    rows: Mapping[str, Sequence[Request]],
    votes: Sequence[judging.Vote],
    sink: _Priced,
    progress: Progress,
) -> None:
    name = judge.arm.name
    questions = {
        (task.name, item.id): question_of(item.ask)
        for task in tasks
        for item in task.items(options.limit, options.seed)
    }
    jobs = list(judging.vote_jobs(votes, name))
    if len(rows) > 1:
        jobs += judging.pair_jobs(rows, questions, name)
    else:
        rubric = options.judge_settings.judge_rubric
        jobs += judging.rubric_jobs(rows, questions, name, rubric)
    sink.mark("judging", arm=name, num_requests=len(jobs))
    progress.begin(f"{name}: judging", len(jobs))
    await run_jobs(
        judge.target, jobs, writer=sink, concurrency=options.concurrency, on_row=progress.row
    )

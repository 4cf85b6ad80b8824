"""One evaluation from its options to its run: targets, tasks, harness, judge, rows, figures.

Owns the order of things. Everything that can be wrong with tasks and votes is found before a
target is started or asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec, parse_arm, parse_arms
from penstock.measure.engines.launcher import Running, launched
from penstock.measure.environment import hash_file
from penstock.measure.kinds import finish
from penstock.measure.load.endpoint import api_key
from penstock.measure.load.target import Ask
from penstock.measure.meters.price_lists import Price
from penstock.measure.meters.prices import NoPrice, provider_of, set_cost
from penstock.measure.meters.settings import MeterSettings, load_prices
from penstock.measure.quality import judge as judging
from penstock.measure.quality import suites
from penstock.measure.quality.runner import run_jobs, run_task
from penstock.measure.quality.tasks import Task
from penstock.measure.records import Arm, Record, Request
from penstock.measure.run import Figures, Writer, new_header, runs_dir

if TYPE_CHECKING:
    from penstock.measure.quality.harness.run import Plan

KIND = "eval"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `penstock eval` was told. `own` are defaults for lines of own tasks."""

    targets: Sequence[str]
    tasks: Sequence[str]
    data: Path | None = None
    limit: int | None = None
    seed: int = 0
    repeats: int = 1
    concurrency: int = 8
    temperature: float | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    num_fewshot: int | None = None
    judge: str | None = None
    votes: Path | None = None
    judge_settings: judging.JudgeSettings = field(default_factory=judging.JudgeSettings)
    out: Path | None = None
    api_key_env: str | None = None
    judge_api_key_env: str | None = None
    timeout_s: float = 600.0
    meters: MeterSettings = field(default_factory=MeterSettings)


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

    def add(self, record: Record) -> None:
        if isinstance(record, Request) and record.arm in self.prices:
            set_cost(record, self.prices[record.arm])
        self.writer.add(record)

    def mark(self, name: str, *, arm: str = "", stage: str = "", **facts: Any) -> None:
        self.writer.mark(name, arm=arm, stage=stage, **facts)


async def evaluate(options: Options, progress: Progress) -> tuple[Path, Figures]:
    """Run it; the run's directory and its figures.

    Raises:
        ConfigError, EngineError: a target, a task or an option cannot be used.
    """
    options.judge_settings.check()
    tasks = suites.find_all(
        options.tasks, options.data, num_fewshot=options.num_fewshot, **options.own
    )
    plan = _plan(options)
    votes = judging.read_votes(options.votes) if options.votes else []
    specs = parse_arms(options.targets)
    judge_spec = _judge_spec(options, specs)
    async with AsyncExitStack() as stack:
        running = {}
        for spec in specs:
            progress.say(f"{spec.name}: getting ready")
            if tasks or spec.kind != IN_PROCESS:
                running[spec.name] = await _launch(stack, spec, options, options.api_key_env)
        judge = None
        if judge_spec is not None:
            progress.say(f"{judge_spec.name}: getting ready")
            judge = await _launch(stack, judge_spec, options, options.judge_api_key_env)
        arms = [running[spec.name].arm if spec.name in running else _arm_of(spec) for spec in specs]
        prices = _prices(options, [one for one in (*running.values(), judge) if one is not None])
        header = new_header(
            KIND,
            settings=_settings(options, tasks, plan, judge),
            arms=arms,
            hashes=_hashes(options),
            prices=msgspec.to_builtins(prices),
        )
        writer = stack.enter_context(Writer(header, options.out))
        sink = _Priced(writer, prices)
        rows = await _ask(options, tasks, running, sink, progress)
        if plan is not None:
            for spec in specs:
                progress.say(f"{spec.name}: lm-evaluation-harness")
                if spec.kind == IN_PROCESS and spec.name in running:
                    await running[spec.name].target.close()  # the harness loads its own engine
                _harness(options, plan, spec, running.get(spec.name), sink)
        if judge is not None:
            await _judge(options, judge, tasks, rows, votes, sink, progress)
    return writer.path, finish(writer.path)


def _plan(options: Options) -> Plan | None:
    names = suites.of_harness(options.tasks)
    if not names:
        return None
    from penstock.measure.quality.harness.run import prepare

    return prepare(
        names,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        chat=options.chat,
        sources=None if options.data is None else [options.data],
    )


def _judge_spec(options: Options, specs: Sequence[ArmSpec]) -> ArmSpec | None:
    if options.judge is None:
        return None
    spec = parse_arm(options.judge)
    if spec.name in {other.name for other in specs}:
        spec = replace(spec, name=f"judge {spec.name}")
    return spec


async def _launch(
    stack: AsyncExitStack, spec: ArmSpec, options: Options, key_env: str | None
) -> Running:
    key = api_key(key_env) if spec.kind == URL else None
    logs = (options.out or runs_dir()) / "logs"
    if spec.is_started:  # asked in chat or in plain text, as a task wants
        logs.mkdir(parents=True, exist_ok=True)
        spec = replace(spec, options={"dialect": "auto", **spec.options})
    return await stack.enter_async_context(
        launched(spec, log_dir=logs, api_key=key, timeout_s=options.timeout_s)
    )


def _arm_of(spec: ArmSpec) -> Arm:
    """An engine that only the harness loads, in this process."""
    flags = [f"{name}={value}" for name, value in spec.options.items()]
    return Arm(
        name=spec.name, target=spec.text, model=spec.location, engine="penstock", flags=flags
    )


def _settings(
    options: Options, tasks: Sequence[Task], plan: Plan | None, judge: Running | None
) -> dict[str, Any]:
    """What figures depend on, and what a repetition needs."""
    facts = {task.name: task.facts(len(task.items(options.limit, options.seed))) for task in tasks}
    settings: dict[str, Any] = {
        "tasks": facts,
        "repeats": {task.name: options.repeats for task in tasks},
        "limit": options.limit,
        "seed": options.seed,
        "concurrency": options.concurrency,
        "temperature": options.temperature,
    }
    if plan is not None:
        settings["tasks"] = facts | plan.facts()
        settings["harness"] = plan.settings()
    if judge is not None:
        told = options.judge_settings
        settings["judge"] = {
            "arm": judge.arm,
            "rubric": told.judge_rubric,
            "min_kappa": told.judge_min_kappa,
            "max_flips": told.judge_max_flips,
            "max_unreadable": told.judge_max_unreadable,
        }
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    return plain


def _hashes(options: Options) -> dict[str, str]:
    """Of the files that the user named."""
    files = [name for name in options.tasks if Path(name).suffix in suites.FILES]
    files += [str(options.votes)] if options.votes else []
    return {name: hash_file(Path(name)) for name in files}


def _prices(options: Options, running: Sequence[Running]) -> dict[str, Price | NoPrice]:
    """By arm, for those at a provider's URL."""
    providers = {
        one.arm.name: provider_of(one.url) or one.arm.provider for one in running if one.url
    }
    if not any(providers.values()):
        return {}
    lists = load_prices(options.meters)
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
                change=change,
                on_row=progress.row,
            )
    return rows


def _harness(
    options: Options, plan: Plan, spec: ArmSpec, running: Running | None, sink: _Priced
) -> None:
    """Blocks the event loop: some of lm-eval's graders need the main thread for their alarms."""
    from penstock.measure.quality.harness.run import run_harness

    if spec.kind == IN_PROCESS:
        from penstock.measure.offline import config_of
        from penstock.measure.quality.harness import inprocess

        config = config_of(spec.location, spec.options)
        names = [name.replace("-", "_") for name in spec.options]
        access = inprocess.load(spec.location, **{name: getattr(config, name) for name in names})
    else:
        from penstock.measure.quality.harness import http

        assert running is not None
        access = http.connect(
            running.url,
            model=running.arm.model or None,
            api_key=api_key(options.api_key_env) if spec.kind == URL else None,
            chat=options.chat,
            num_concurrent=options.concurrency,
            timeout_s=options.timeout_s,
        )
    try:
        run_harness(access, plan, writer=sink, arm=spec.name)
    finally:
        access.close()


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
        (task.name, item.id): judging.question_of(item.ask)
        for task in tasks
        for item in task.items(options.limit, options.seed)
    }
    jobs = list(judging.vote_jobs(votes, name))
    if len(rows) > 1:
        jobs += judging.pair_jobs(rows, questions, name)
    else:
        rubric = options.judge_settings.judge_rubric
        jobs += judging.rubric_jobs(rows, questions, name, rubric)
    progress.begin(f"{name}: judging", len(jobs))
    await run_jobs(
        judge.target, jobs, writer=sink, concurrency=options.concurrency, on_row=progress.row
    )

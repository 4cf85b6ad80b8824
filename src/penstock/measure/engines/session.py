"""One run of the kind `engines`, from what the user said to its directory with figures and page."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.engines import page_cache, recipes
from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec, parse_arms
from penstock.measure.engines.rounds import Plan, measure
from penstock.measure.engines.workload import Work, model_directory, vocab_size
from penstock.measure.environment import hash_directory, hash_file
from penstock.measure.load.endpoint import api_key
from penstock.measure.meters import settings as meters
from penstock.measure.records import Arm
from penstock.measure.run import Figures, Writer, new_header


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user said. `facts` go into the header's settings as they are."""

    command: str
    arms: Sequence[str]
    works: Sequence[Work]
    num_rounds: int
    seed: int
    is_cold: bool
    out: Path | None
    api_key_env: str | None
    ready_timeout_s: float
    request_timeout_s: float
    meters: meters.MeterSettings
    facts: dict[str, Any] = field(default_factory=dict)


async def run_session(options: Options, *, say: Callable[[str], None]) -> tuple[Path, Figures]:
    """Measure the arms and make figures and page; the run's directory, and the figures.

    Raises:
        ConfigError: an arm or an option is wrong. What fails later is in the figures.
    """
    specs = parse_arms(options.arms)
    wrong = [error for spec in specs if (error := _what_is_wrong(spec)) is not None]
    if len(wrong) == len(specs):  # else it is a reason in the table
        raise wrong[0]
    vocab = vocab_size(specs)
    settings = {
        "command": options.command,
        "num_rounds": options.num_rounds,
        "seed": options.seed,
        "page_cache": "cold" if options.is_cold else "warm",
        "works": [work.settings() for work in options.works],
        "lengths": {work.stage: work.lengths for work in options.works},
        "prompts": "words" if vocab is None else f"token ids below {vocab}, where taken",
        **options.facts,
        **meters.prepare(options.meters),
    }
    key = api_key(options.api_key_env) if any(spec.kind == URL for spec in specs) else None
    arms = await asyncio.to_thread(lambda: [describe(spec) for spec in specs])
    with Writer(new_header("engines", settings=settings, arms=arms), options.out) as writer:
        plan = Plan(
            specs=specs,
            works=options.works,
            num_rounds=options.num_rounds,
            seed=options.seed,
            vocab=vocab,
            is_cold=options.is_cold,
            log_dir=writer.path / "logs",
            api_key=key,
            ready_timeout_s=options.ready_timeout_s,
            request_timeout_s=options.request_timeout_s,
            meter_interval_s=options.meters.meter_interval,
        )
        with _terminated_as_interrupted():
            await measure(plan, writer, say)
    return writer.path, kinds.finish(writer.path)


def describe(spec: ArmSpec) -> Arm:
    """What is known of an arm before it runs: flags, version, hashes of the model's files."""
    arm = Arm(name=spec.name, target=spec.text, model=spec.model or spec.location)
    if spec.kind == URL:
        arm.model = spec.model or ""
        return arm
    arm.precision = recipes.precision(spec)
    directory = model_directory(spec)
    if directory is not None:
        arm.hashes["model"] = hash_directory(directory)
    elif files := page_cache.files_of(spec.location):
        arm.hashes["model"] = hash_file(files[0])
    if spec.is_started:
        arm.engine, arm.flags = spec.kind, recipes.flags(spec)
        with contextlib.suppress(ConfigError):  # it is not installed
            arm.engine_version = recipes.version(spec)
    else:
        arm.engine = "penstock"
        arm.flags = [f"{name}={value}" for name, value in spec.options.items()]
    return arm


def _what_is_wrong(spec: ArmSpec) -> ConfigError | None:
    """What can be found wrong with an arm without starting it: not installed, a wrong option."""
    try:
        if spec.is_started:
            recipes.executable(spec)
        elif spec.kind == IN_PROCESS:
            from penstock.measure.offline import config_of

            config_of(spec.location, spec.options)
    except ConfigError as error:
        return error
    return None


class _terminated_as_interrupted:
    """SIGTERM cancels the run as Ctrl-C does, so that engines are ended, not left."""

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._loop.add_signal_handler(signal.SIGTERM, task.cancel)

    def __exit__(self, *_: object) -> None:
        self._loop.remove_signal_handler(signal.SIGTERM)

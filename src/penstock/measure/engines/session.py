"""One run of the kind `engines`, from what the user said to its directory of records."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.engines import page_cache, recipes
from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec, parse_arms
from penstock.measure.engines.process import sigterm_cancels
from penstock.measure.engines.rounds import Plan, measure
from penstock.measure.engines.workload import Work, model_directory, vocab_size
from penstock.measure.environment import hash_directory, hash_file
from penstock.measure.load.endpoint import api_key, headers_of
from penstock.measure.meters import settings as meters
from penstock.measure.records import Arm
from penstock.measure.run import Writer, new_header


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
    header_env: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class Session:
    """One command. `path` is the run's directory as soon as there is one."""

    def __init__(self, options: Options) -> None:
        """Read and check all there is to read before anything is started.

        Raises:
            ConfigError: every arm is wrong, or an option is. What fails later is in the figures.
        """
        self.path: Path | None = None
        self._options = options
        self._specs = parse_arms(options.arms)
        wrong = [error for spec in self._specs if (error := _what_is_wrong(spec)) is not None]
        if len(wrong) == len(self._specs):  # else it is a reason in the table
            raise wrong[0]
        has_url = any(spec.kind == URL for spec in self._specs)
        if options.header_env and not has_url:
            raise ConfigError("`--header-env` goes with a URL, and no arm is one.")
        self._key = api_key(options.api_key_env) if has_url else None
        self._headers = headers_of(options.header_env)
        self._metered = meters.prepare(options.meters)
        self._vocab = vocab_size(self._specs)

    async def run(self, say: Callable[[str], None]) -> None:
        """Make the run and measure the arms.

        Raises:
            asyncio.CancelledError: it was interrupted; what was finished is recorded.
        """
        options = self._options
        arms = await asyncio.to_thread(lambda: [describe(spec) for spec in self._specs])
        header = new_header("engines", settings=self._settings(), arms=arms)
        with Writer(header, options.out) as writer:
            self.path = writer.path
            plan = Plan(
                specs=self._specs,
                works=options.works,
                num_rounds=options.num_rounds,
                seed=options.seed,
                vocab=self._vocab,
                is_cold=options.is_cold,
                log_dir=writer.path / "logs",
                api_key=self._key,
                headers=self._headers,
                ready_timeout_s=options.ready_timeout_s,
                request_timeout_s=options.request_timeout_s,
                meter_interval_s=options.meters.meter_interval,
            )
            with sigterm_cancels():
                await measure(plan, writer, say)

    def _settings(self) -> dict[str, Any]:
        options, vocab = self._options, self._vocab
        return {
            "command": options.command,
            "num_rounds": options.num_rounds,
            "seed": options.seed,
            "page_cache": "cold" if options.is_cold else "warm",
            "works": [work.settings() for work in options.works],
            "lengths": {work.stage: work.lengths for work in options.works},
            "prompts": "words" if vocab is None else f"token ids below {vocab}, where taken",
            **options.facts,
            **self._metered,
        }


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

"""A comparison from what the user said to its records: checked, arms started, header, ended.

Everything that can be wrong with settings, tasks and prices is found before an arm is started.
Knows neither what is asked (`session`) nor what it means (`figures`).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure import environment, kinds
from penstock.measure.engines.arms import URL, ArmSpec
from penstock.measure.engines.launcher import Running
from penstock.measure.engines.process import sigterm_cancels
from penstock.measure.engines.workload import model_directory
from penstock.measure.environment import hash_directory
from penstock.measure.meters import prices
from penstock.measure.meters import settings as meter_options
from penstock.measure.meters.price_lists import Price
from penstock.measure.quality.tasks import Task, TaskFacts
from penstock.measure.records import Arm
from penstock.measure.run import Figures, Writer, new_header
from penstock.measure.verdict.arms import Arms
from penstock.measure.verdict.divergence_run import is_possible
from penstock.measure.verdict.plan import Plan
from penstock.measure.verdict.session import Progress, Session
from penstock.measure.verdict.settings import LoadSettings, RuleSettings


class Measurement:
    """A comparison that was read and checked, and then is made.

    `path` is the run's directory as soon as there is one.
    """

    def __init__(
        self,
        specs: tuple[ArmSpec, ArmSpec],
        tasks: Sequence[Task],
        *,
        load: LoadSettings,
        rules: RuleSettings,
        meters: meter_options.MeterSettings,
        directory: Path | None = None,
        api_keys: tuple[str | None, str | None] = (None, None),
        hashes: dict[str, str] | None = None,
    ) -> None:
        """Read and check all there is to read before anything is started.

        Args:
            api_keys: of arms that are URLs, the base's and the variant's.
            hashes: SHA-256 of the user's files, by path.

        Raises:
            ConfigError: a setting is wrong.
        """
        load.check()
        if not tasks and not load.blocks:
            raise ConfigError(
                "There is nothing to compare: no task and no block.",
                hint="--tasks, --prompts, --blocks",
            )
        self.path: Path | None = None
        self._specs = (_speaking(specs[0]), _speaking(specs[1]))
        self._tasks, self._load = tasks, load
        self._rule = rules.rule(len(load.looks))
        self._asked = {task.name: task.items(load.limit, load.seed) for task in tasks}
        self._interval_s = meters.meter_interval
        self._metered = meter_options.prepare(meters)
        has_url = any(spec.kind == URL for spec in specs)
        self._prices = meter_options.load_prices(meters) if has_url else None
        self._directory, self._hashes = directory, hashes or {}
        self._api_keys = api_keys

    async def run(self, progress: Progress) -> None:
        """Ask both arms and write the records; what was started is ended, also when cancelled.

        Raises:
            ConfigError: an arm cannot be had.
            EngineFailed: an arm died.
            asyncio.CancelledError: Ctrl-C or SIGTERM; what was asked until then is written.
        """
        specs = self._specs
        before = environment.capture()  # of the machine, before the arms are on it
        with tempfile.TemporaryDirectory(prefix="penstock-compare-") as logs, sigterm_cancels():
            arms = Arms(
                specs,
                log_dir=Path(logs),
                residency=self._load.residency,
                api_keys=self._api_keys,
            )
            async with arms:
                progress("starting both arms")
                both = await arms.start()
                price_of = self._prices_of(both)
                header = new_header(
                    "compare",
                    settings=self._settings(arms.residency),
                    arms=[_hashed(running) for running in both],
                    hashes=self._hashes,
                    prices={name: msgspec.to_builtins(one) for name, one in price_of.items()},
                    environment=before,
                )
                with Writer(header, self._directory) as writer:
                    self.path = writer.path
                    progress(f"records are kept in {writer.path}")
                    for running in both:
                        for limit in running.target.limits:
                            writer.mark("limit", arm=running.arm.name, message=limit)
                    session = Session(
                        writer, arms, self._tasks, self._asked, self._load, price_of, progress
                    )
                    await session.measure(self._interval_s)
                    await arms.close()
                    await session.divergence(specs)

    def _settings(self, residency: str) -> dict[str, Any]:
        facts: dict[str, TaskFacts] = {
            task.name: task.facts(len(self._asked[task.name])) for task in self._tasks
        }
        return {
            "rule": msgspec.to_builtins(self._rule),
            "load": self._load.as_facts() | {"residency": residency},
            "plan": msgspec.to_builtins(self._plan()),
            "seed": self._load.seed,
            "tasks": msgspec.to_builtins(facts),
            **self._metered,
        }

    def _plan(self) -> Plan:
        load = self._load
        num_items = {name: len({item.id for item in items}) for name, items in self._asked.items()}
        diverges = bool(num_items) and is_possible(self._specs)
        return Plan(
            num_items=num_items,
            num_chunks=min(load.chunks, sum(num_items.values())),
            noise_blocks=load.noise_blocks if load.blocks else 0,
            blocks=load.looks[0],
            most_blocks=load.looks[-1],
            requests=load.requests if load.blocks else 0,
            divergence_tokens=load.divergence_tokens if diverges else 0,
        )

    def _prices_of(self, both: Sequence[Running]) -> dict[str, Price]:
        """Prices of tokens, for arms of providers that have one."""
        found = {}
        for running in both:
            if running.spec.kind != URL or self._prices is None:
                continue
            arm = running.arm
            arm.provider = arm.provider or prices.provider_of(running.spec.location)
            price = self._prices.find(arm.provider, arm.model)
            if isinstance(price, Price):
                found[arm.name] = price
        return found


def run(
    specs: tuple[ArmSpec, ArmSpec],
    tasks: Sequence[Task],
    *,
    progress: Progress = lambda line: None,
    **more: Any,
) -> tuple[Path, Figures]:
    """Compare two arms and write the run. Returns its directory and the figures.

    Args:
        more: as `Measurement`.

    Raises:
        ConfigError, EngineFailed: as `Measurement`.
    """
    measurement = Measurement(specs, tasks, **more)
    asyncio.run(measurement.run(progress))
    assert measurement.path is not None
    return measurement.path, kinds.finish(measurement.path)


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

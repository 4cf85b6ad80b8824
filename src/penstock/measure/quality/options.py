"""What an evaluation was told, and whether all of it can be used. Knows no target and no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from penstock.errors import ConfigError
from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.quality import suites
from penstock.measure.quality.judge import JudgeSettings


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `penstock eval` was told.

    `own` are defaults for lines of own tasks. `named` are the fields that the user gave a value to:
    a default that nothing comes of is no mistake.
    """

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
    judge_settings: JudgeSettings = field(default_factory=JudgeSettings)
    out: Path | None = None
    api_key_env: str | None = None
    judge_api_key_env: str | None = None
    timeout_s: float = 600.0
    meters: MeterSettings = field(default_factory=MeterSettings)
    named: frozenset[str] = frozenset()

    def check(self, specs: Sequence[ArmSpec], judge: ArmSpec | None) -> None:
        """Raise ConfigError for an option that cannot be used, or that nothing would come of."""
        if not self.tasks:
            raise ConfigError("`--tasks` names no task.", hint="`--list-tasks` tells what it takes")
        self.judge_settings.check()
        uses = (*self._uses(), *self._uses_of_tasks(), *self._uses_of_targets(specs, judge))
        for option, is_used, wanted in uses:
            if not is_used:
                raise ConfigError(f"`--{option}` is given, and nothing would come of it: {wanted}.")

    def _uses(self) -> Iterator[tuple[str, bool, str]]:
        """Each option that was given, whether something uses it, and what would."""
        harness = bool(suites.of_harness(self.tasks))
        others = len(suites.of_harness(self.tasks)) < len(self.tasks)
        own = any(Path(name).suffix in suites.FILES for name in self.tasks)
        for name in self.own:
            yield name.replace("_", "-"), own, "it is for tasks in files of your own"
        told = {
            "chat": (self.chat, harness, "it is for `lm:` tasks"),
            "num-fewshot": (
                self.num_fewshot is not None,
                harness or "gsm8k" in self.tasks,
                "it is for `gsm8k` and `lm:` tasks",
            ),
            "temperature": (self.temperature is not None, others, "`lm:` tasks have their own"),
            "repeats": (self.repeats > 1, others, "`lm:` tasks are asked once"),
            "judge": (self.judge is not None, others, "answers to `lm:` tasks are not judged"),
            "judge-api-key-env": (
                self.judge_api_key_env is not None,
                self.judge is not None,
                "no `--judge` is named",
            ),
        }
        yield from ((name, used, why) for name, (given, used, why) in told.items() if given)
        yield from self._uses_of_judge()

    def _uses_of_tasks(self) -> Iterator[tuple[str, bool, str]]:
        names = [name for name in self.tasks if not name.startswith(suites.HARNESS)]
        inner = all(name == "brook" or Path(name).suffix in suites.FILES for name in names)
        reads = len(names) < len(self.tasks) or not inner
        if self.data is not None:
            yield "data", reads, "`brook` and tasks of your own need no published data"
        if "seed" in self.named:
            yield "seed", bool(names), "of `lm:` tasks the first items are taken"
            yield "seed", self.limit is not None, "without `--limit` all items are asked"

    def _uses_of_targets(
        self, specs: Sequence[ArmSpec], judge: ArmSpec | None
    ) -> Iterator[tuple[str, bool, str]]:
        harness_alone = len(suites.of_harness(self.tasks)) == len(self.tasks)
        everyone = [*specs, *([] if judge is None else [judge])]
        if self.api_key_env is not None:
            used = any(spec.kind == URL for spec in specs)
            yield "api-key-env", used, "no target is a URL, and an engine started here gets no key"
        if self.judge_api_key_env is not None and judge is not None:
            yield "judge-api-key-env", judge.kind == URL, "the judge is no URL"
        for name in self.named & {"concurrency", "timeout"}:
            used = not harness_alone or any(spec.kind != IN_PROCESS for spec in specs)
            yield name, used, "in process, `lm:` tasks are asked all at once"
        for name in self.named & {"prices", "tables"}:
            yield name, any(map(is_paid, everyone)), "no target is at the address of a provider"

    def _uses_of_judge(self) -> Iterator[tuple[str, bool, str]]:
        needs = {
            "judge_rubric": (len(self.targets) == 1, "several targets are judged in pairs"),
            "judge_min_kappa": (self.votes is not None, "no `--votes` are named"),
        }
        for one in fields(JudgeSettings):
            if getattr(self.judge_settings, one.name) != one.default:
                name = one.name.replace("_", "-")
                yield name, self.judge is not None, "no `--judge` is named"
                yield name, *needs.get(one.name, (True, ""))


def is_paid(spec: ArmSpec) -> bool:
    """Whether tokens there may have a price: the host has a name of its own."""
    host = urlsplit(spec.location).hostname or ""
    has_name = "." in host and ":" not in host and not host.replace(".", "").isdigit()
    return spec.kind == URL and has_name

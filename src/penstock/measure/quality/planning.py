"""What an evaluation will do, as its header says it: tasks, harness, judge, hashes of files.

With it, what is missing of a run that was stopped is known from the run alone. Asks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.environment import hash_file
from penstock.measure.quality import suites
from penstock.measure.quality.options import Options
from penstock.measure.quality.tasks import Task, TaskFacts

if TYPE_CHECKING:
    from penstock.measure.engines.launcher import Running
    from penstock.measure.quality.harness.run import Plan

Facts = tuple[dict[str, TaskFacts], dict[str, TaskFacts]]  # of our tasks, and of the harness's


def plan_of(options: Options) -> Plan | None:
    """What the harness will do, with its data; None without tasks of it."""
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


def facts_of(options: Options, tasks: Sequence[Task], plan: Plan | None) -> Facts:
    """What is planned, by task: of ours, and of the harness."""
    ours = {task.name: task.facts(len(task.items(options.limit, options.seed))) for task in tasks}
    theirs = {} if plan is None else plan.facts()
    if both := ours.keys() & theirs.keys():
        raise ConfigError(f"`--tasks` has two tasks with the name `{min(both)}`.")
    return ours, theirs


def settings_of(
    options: Options,
    facts: Facts,
    plan: Plan | None,
    judge: Running | None,
) -> dict[str, Any]:
    """What figures depend on, and what a repetition needs."""
    ours, theirs = facts
    settings: dict[str, Any] = {
        "tasks": ours | theirs,
        "repeats": dict.fromkeys(ours, options.repeats),
        "limit": options.limit,
        "seed": options.seed,
        "concurrency": options.concurrency,
        "temperature": options.temperature,
    }
    if plan is not None:
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


def hashes_of(options: Options) -> dict[str, str]:
    """Of the files that the user named."""
    files = [name for name in options.tasks if Path(name).suffix in suites.FILES]
    files += [str(options.votes)] if options.votes else []
    return {name: hash_file(Path(name)) for name in files}

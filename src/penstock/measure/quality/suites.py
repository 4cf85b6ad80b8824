"""Finds tasks by the names that `penstock eval` takes. Knows no target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.quality.jsonl import data_dir as directory_of
from penstock.measure.quality.tasks import Task

HARNESS = "lm:"
KNOWN = {
    "brook": "held-out items of brook's small worlds; in the package",
    "gsm8k": "grade-school sums, 5 shots; the number after `####`",
    "ifeval": "instructions that a program can check, strict and loose",
    "flores:SRC-TGT": "translation, as `flores:eng_Latn-deu_Latn`; chrF++ and BLEU",
    "cnndm": "summaries of news; ROUGE",
    "mt-bench": "80 open questions without references, for `--judge`",
    "FILE.jsonl": "your own: lines with `prompt` or `messages`, `reference`, `grader`",
    "FILE.txt": "a prompt on each line; after a tab, its reference",
    "lm:NAME": "of lm-evaluation-harness: a task, group or tag, as `lm:arc_easy`; the Open LLM "
    "Leaderboards are `lm:openllm` and `lm:leaderboard`",
}
FILES = (".jsonl", ".txt", ".tsv")


def find(
    name: str, data_dir: Path | None = None, num_fewshot: int | None = None, **defaults: Any
) -> Task:
    """The task of a name; those of the harness (`lm:`) are not found here.

    Args:
        data_dir: the directory of published data sets; default: PENSTOCK_DATA.
        num_fewshot: solved examples before each question, of `gsm8k`; default: 5.
        defaults: for lines of own tasks that say nothing (`grader`, `max_tokens`, ...).

    Raises:
        ConfigError: the name is not known, or its data are not there or damaged.
    """
    if name == "brook":
        from penstock.measure.quality.brook import Brook

        return Brook()
    if Path(name).suffix in FILES:
        from penstock.measure.quality.own import read

        return read(Path(name), **defaults)
    if name == "gsm8k":
        from penstock.measure.quality.gsm8k import Gsm8k

        return Gsm8k(directory_of(data_dir), 5 if num_fewshot is None else num_fewshot)
    if name == "ifeval":
        from penstock.measure.quality.ifeval.task import Ifeval

        return Ifeval(directory_of(data_dir))
    if name in ("cnndm", "mt-bench") or name.startswith("flores:"):
        from penstock.measure.quality import texts

        make = {"cnndm": texts.cnndm, "mt-bench": texts.mt_bench}.get(name)
        directory = directory_of(data_dir)
        return make(directory) if make else texts.flores(name, directory)
    raise ConfigError(f"`--tasks` names `{name}`.", hint=f"known: {', '.join(KNOWN)}")


def find_all(names: Sequence[str], data_dir: Path | None = None, **defaults: Any) -> list[Task]:
    """The tasks of these names, without those of the harness.

    Raises:
        ConfigError: as `find`, two have the same name, or nothing would come of a default.
    """
    from penstock.measure.quality.own import GradedTask

    tasks: dict[str, Task] = {}
    unused: list[frozenset[str]] = []
    for name in names:
        if not name.startswith(HARNESS):
            task = find(name, data_dir, **defaults)
            if task.name in tasks:
                raise ConfigError(f"`--tasks` has two tasks with the name `{task.name}`.")
            tasks[task.name] = task
            if isinstance(task, GradedTask) and Path(name).suffix in FILES:
                unused.append(task.unused)
    if unused and (idle := frozenset.intersection(*unused)):
        raise ConfigError(
            f"`--{min(idle).replace('_', '-')}` is given, and nothing would come of it: it is for "
            "lines that name none, and all of your own do."
        )
    return list(tasks.values())


def of_harness(names: Sequence[str]) -> list[str]:
    """The names of the harness's tasks, as the harness has them."""
    return [name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS)]

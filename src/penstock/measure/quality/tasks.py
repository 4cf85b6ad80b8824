"""What a task is: items to ask, a way to grade their answers, and the facts its figures need.

Knows no target and no file. `TaskFacts` go into the header of a run, so that every figure can be
computed again from the raw rows without the task's code or data. Scores are numbers, 1 is right
and 0 is wrong where a score is a share; higher is better unless the facts say otherwise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import msgspec

from penstock.measure.load.target import Ask, Reply

JUDGE = "judge"  # the name of no task: a judge's rows have it


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    `id` is unique within its task. `group` is the cluster that its standard error is computed by
    (items that share a text or a template depend on one another); `category` is what scores are
    also shown by. `details` go into the row: whatever a figure needs.
    """

    id: str
    ask: Ask
    reference: Any = None
    group: str = ""
    category: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class ScoreFacts(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """How the scores of many rows become one figure.

    `mean` is the mean over items, weighted by `details[weight]` where that is named. `corpus` is
    computed from all outputs and `details["references"]` at once by `text_metrics.corpus`, with
    the arguments `metric`.
    """

    how: Literal["mean", "corpus"] = "mean"
    weight: str | None = None
    metric: dict[str, str] = {}
    higher_is_better: bool = True


class TaskFacts(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """What a run's header says of a task: `settings["tasks"][name]`."""

    name: str
    main_score: str
    scores: dict[str, ScoreFacts]
    random_baseline: float | None = None  # of the main score; None: chance means nothing here
    data_hash: str
    data_source: str = ""
    num_items: int = 0  # that were asked
    published: dict[str, Any] = {}  # scores to compare with, and where they stand


@runtime_checkable
class Task(Protocol):
    """Something to be good at."""

    @property
    def name(self) -> str:
        """Unique in a run."""

    @property
    def data_hash(self) -> str:
        """sha256 of all items, references included."""

    @property
    def main_score(self) -> str:
        """The score that a comparison is made on."""

    @property
    def higher_is_better(self) -> bool:
        """Of the main score."""

    @property
    def random_baseline(self) -> float | None:
        """What chance gets of the main score; None where chance means nothing."""

    def facts(self, num_items: int) -> TaskFacts:
        """What the header of a run with so many items says."""

    def items(self, limit: int | None = None, seed: int = 0) -> list[Item]:
        """The items, or a sample of `limit` of them that only depends on `seed`."""

    def grade(self, item: Item, reply: Reply) -> dict[str, float]:
        """Scores of an answer, by name. Never raises for what a model wrote."""


T = TypeVar("T")


def sample(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """`limit` of the items, drawn without replacement, in their own order.

    A smaller sample with the same seed is part of a larger one.
    """
    if limit is None or limit >= len(items):
        return list(items)
    order = list(range(len(items)))
    random.Random(f"sample {seed}").shuffle(order)
    return [items[index] for index in sorted(order[:limit])]


def sample_evenly(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Like `sample`, with the same number of every category (as far as the categories go)."""
    if limit is None or limit >= len(items):
        return list(items)
    rng = random.Random(f"sample {seed}")
    queues: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        queues.setdefault(item.category, []).append(index)
    for queue in queues.values():
        rng.shuffle(queue)
    chosen: list[int] = []
    while len(chosen) < limit:
        for queue in queues.values():
            if queue and len(chosen) < limit:
                chosen.append(queue.pop())
    return [items[index] for index in sorted(chosen)]


def hash_of(items: Iterable[Item]) -> str:
    """sha256 over ids, what is asked, and references."""
    digest = hashlib.sha256()
    for item in items:
        parts = [item.id, msgspec.to_builtins(item.ask), item.reference, item.details]
        digest.update(msgspec.json.encode(parts, order="deterministic"))
        digest.update(b"\n")
    return digest.hexdigest()

"""GSM8K: grade-school sums, answered with the steps and `#### ` before the result.

Scored as its authors do (Cobbe et al. 2021, `grade_school_math/dataset.py`): the number after the
first marker, commas removed, equals the reference's. `flexible` takes the answer's last number.
"""

from __future__ import annotations

import random
import re
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path

from penstock.measure.load.target import Ask, Reply
from penstock.measure.quality.jsonl import read_jsonl
from penstock.measure.quality.tasks import Item, ScoreFacts, TaskFacts, hash_of, sample

MAX_TOKENS = 400
# The published solutions of models end with `A: 18`, the data set's with `#### 18`.
_MARKED = re.compile(r"####\s*\$?(-?[0-9.,]+)")
_LETTERED = re.compile(r"^A:\s*\$?(-?[0-9.,]+)", re.MULTILINE)
_ANY = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def marked_answer(text: str) -> str | None:
    """What stands after the first marker, without commas and a final stop; None without one."""
    found = _MARKED.search(text) or _LETTERED.search(text)
    return _plain(found[1]) if found else None


def last_number(text: str) -> str | None:
    """The last number of the text, without commas."""
    found = _ANY.findall(text)
    return _plain(found[-1]) if found else None


def _plain(written: str) -> str:
    return written.replace(",", "").rstrip(".")


def same_number(ours: str | None, theirs: str | None) -> bool:
    """Whether both are there and the same number: `18` and `18.00` are."""
    if not ours or not theirs:
        return False
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:  # such as `1.2.3`
        return ours == theirs


def is_correct(solution: str, truth: str) -> bool:
    """Whether a solution's marked answer is that of the true solution."""
    return same_number(marked_answer(solution), marked_answer(truth))


class Gsm8k:
    """The test set, with `num_shots` solved examples of the training set as earlier turns."""

    name = "gsm8k"
    main_score = "exact_match"
    higher_is_better = True
    random_baseline = 0.0

    def __init__(self, data_dir: Path, num_shots: int = 5, shots_seed: int = 0) -> None:
        self._directory = data_dir / "eval-gsm8k"
        self._num_shots = num_shots
        self._shots_seed = shots_seed
        self._lines = read_jsonl(self._directory / "test.jsonl", "question", "answer")

    @cached_property
    def _shots(self) -> list[dict[str, str]]:
        lines = read_jsonl(self._directory / "train.jsonl", "question", "answer")
        chosen = random.Random(f"shots {self._shots_seed}").sample(lines, self._num_shots)
        roles = (("user", "question"), ("assistant", "answer"))
        return [
            {"role": role, "content": _clean(line[key])} for line in chosen for role, key in roles
        ]

    @cached_property
    def _items(self) -> list[Item]:
        return [
            Item(
                id=str(number),
                ask=Ask(
                    prompt_id=str(number),
                    messages=[*self._shots, {"role": "user", "content": line["question"]}],
                    max_tokens=MAX_TOKENS,
                ),
                reference=line["answer"],
                details={"expected": marked_answer(line["answer"])},
            )
            for number, line in enumerate(self._lines)
        ]

    @property
    def data_hash(self) -> str:
        return hash_of(self._items)

    def facts(self, num_items: int) -> TaskFacts:
        return TaskFacts(
            name=self.name,
            main_score=self.main_score,
            scores={self.main_score: ScoreFacts(), "flexible": ScoreFacts()},
            random_baseline=self.random_baseline,
            data_hash=self.data_hash,
            data_source=f"GSM8K test, {self._num_shots} shots of train",
            num_items=num_items,
        )

    def items(self, limit: int | None = None, seed: int = 0) -> list[Item]:
        return sample(self._items, limit, seed)

    def grade(self, item: Item, reply: Reply) -> dict[str, float]:
        flexible = same_number(last_number(reply.text), marked_answer(item.reference))
        return {
            self.main_score: float(is_correct(reply.text, item.reference)),
            "flexible": float(flexible),
        }


def _clean(text: str) -> str:
    """Without the calculator's annotations, such as `<<16-3=13>>`."""
    return re.sub(r"<<[^>]*>>", "", text)

"""The suite `brook`: held-out items of the small worlds that the model brook was trained on.

They are written by `tools/brook/suite.py`, so that this module needs no generator. Answers are
judged by the rules of the model card: equal up to white space and a final full stop, JSON and tool
calls as parsed values, stories by what they name, how long they are and whether they repeat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from importlib.resources import files
from typing import Any

from penstock.measure.load.target import Ask, Reply
from penstock.measure.quality.tasks import Item, ScoreFacts, TaskFacts, sample_evenly

MAX_TOKENS = 256  # of the model card's evaluation
TOOL_CALL = "<|tool_call|>"  # stands before a call where a server shows special tokens


def is_text(text: str, expected: str) -> bool:
    """Equal up to white space and final full stops."""
    return _plain(text) == _plain(expected)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").strip()


def is_json(text: str, expected: Any) -> bool:
    """JSON text of the same value, and nothing around it."""
    try:
        return bool(json.loads(text) == expected)
    except (ValueError, RecursionError):
        return False


def is_call(text: str, expected: dict[str, Any]) -> bool:
    """One call of the same name and arguments, with or without brook's token before it."""
    return is_json(text.strip().removeprefix(TOOL_CALL), expected)


def is_story(text: str, needed: list[str]) -> bool:
    """A finished text of 30 to 200 words that names what was asked for and repeats no sentence."""
    sentences = [part.strip() for part in text.split(".") if part.strip()]
    ended = text.strip().endswith((".", "!", '"'))
    sized = 30 <= len(text.split()) <= 200
    present = all(word in text for word in needed)
    return ended and sized and present and len(set(sentences)) == len(sentences)


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "text": is_text,
    "json": is_json,
    "call": is_call,
    "story": is_story,
}


class Brook:
    """The suite as one task; its own tasks are the categories of the items."""

    name = "brook"
    main_score = "correct"
    higher_is_better = True
    random_baseline = None  # nobody guesses a sorted list

    def __init__(self) -> None:
        data = files("penstock.measure.quality").joinpath("data/brook.jsonl").read_bytes()
        self.data_hash = hashlib.sha256(data).hexdigest()
        head, *self._lines = (json.loads(line) for line in data.splitlines())
        self.groups: dict[str, str] = head["groups"]
        self.model_card: dict[str, list[float]] = head["model_card"]

    @cached_property
    def _items(self) -> list[Item]:
        numbers = dict.fromkeys(self.groups, 0)
        items = []
        for line in self._lines:
            category = line["task"]
            items.append(_item(f"{category}/{numbers[category]}", line, self.groups[category]))
            numbers[category] += 1
        return items

    def facts(self, num_items: int) -> TaskFacts:
        return TaskFacts(
            name=self.name,
            main_score=self.main_score,
            scores={self.main_score: ScoreFacts()},
            data_hash=self.data_hash,
            data_source="tools/brook/suite.py",
            num_items=num_items,
            published={"of": "brook's model card", "by_category": self.model_card},
        )

    def items(self, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Items; with a limit, as many of each category."""
        return sample_evenly(self._items, limit, seed)

    def grade(self, item: Item, reply: Reply) -> dict[str, float]:
        ((kind, expected),) = item.reference.items()
        return {self.main_score: float(CHECKS[kind](reply.text, expected))}


def _item(name: str, line: dict[str, Any], family: str) -> Item:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(line["turns"])]
    if "system" in line:
        turns.insert(0, {"role": "system", "content": line["system"]})
    ((kind, expected),) = ((kind, line[kind]) for kind in CHECKS if kind in line)
    return Item(
        id=name,
        ask=Ask(prompt_id=name, messages=turns, max_tokens=MAX_TOKENS),
        reference={kind: expected},
        group=f"{line['task']}:{line['key']}",
        category=line["task"],
        details={"family": family, "expected": expected},
    )

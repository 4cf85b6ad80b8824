"""What a task instance is, how instances are split, and how answers are compared.

Nothing here or in the task files imports torch, so that `penstock eval` can use the held-out tasks.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat import TOOL_CALL, Message

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 16  # one instance of this many is never trained on


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    `key` names the instance (operands, word, name and value, ...): its hash decides the split.
    `messages` end with the turn to answer; `check` judges a model's answer.
    """

    task: str
    key: str
    messages: Sequence[Message]
    answer: Message
    check: Callable[[str], bool]
    system: str = ""
    tools: Sequence[dict[str, Any]] = field(default_factory=tuple)

    @property
    def answer_text(self) -> str:
        """The answer as the model writes it, special token included."""
        if self.answer.call is None:
            return self.answer.content
        return TOOL_CALL + json.dumps(self.answer.call, ensure_ascii=False)


Generator = Callable[[random.Random], Example]


def is_held_out(task: str, key: str) -> bool:
    """Whether the instance belongs to the evaluation: a pure function of its name.

    An empty key marks fixed text (a greeting), which is trained on and never scored.
    """
    if not key:
        return False
    digest = hashlib.blake2b(f"{task}:{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def draw(generate: Generator, rng: random.Random, split: Split) -> Example:
    """The next example of the wanted split."""
    while True:
        example = generate(rng)
        if is_held_out(example.task, example.key) == (split == "held_out"):
            return example


def normalise(text: str) -> str:
    """Text without the differences that no reader would mind."""
    return " ".join(text.split()).rstrip(".").strip()


def same(expected: str) -> Callable[[str], bool]:
    """Accepts the expected text, up to white space and a final full stop."""
    return lambda text: normalise(text) == normalise(expected)


def same_json(expected: object) -> Callable[[str], bool]:
    """Accepts any JSON text of the same value."""

    def check(text: str) -> bool:
        try:
            return bool(json.loads(text) == expected)
        except ValueError:
            return False

    return check


def same_call(expected: dict[str, Any]) -> Callable[[str], bool]:
    """Accepts one tool call of the same name and arguments, and nothing around it."""

    def check(text: str) -> bool:
        head, marker, body = text.strip().partition(TOOL_CALL)
        return bool(marker) and not head and same_json(expected)(body)

    return check


def ask(task: str, key: str, question: str, answer: str, **extra: Any) -> Example:
    """An example of one question and one text answer."""
    check = extra.pop("check", None) or same(answer)
    messages = [Message("user", question)]
    return Example(task, key, messages, Message("assistant", answer), check, **extra)

"""Training rows: conversations of one or more turns, encoded and cut to a few fixed lengths.

A row is one conversation; turns are added until the next one does not fit, so that little is
padding and no row mixes two conversations. Only the assistant's tokens are learnt; those of a turn
of n tokens weigh 1 / sqrt(n) each, so that long stories do not drown short sums. Generation is some
20 times faster than training, so the trainer calls it inline and no row is ever seen twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .chat import END, PAD, Conversation, Message, Segment, segments
from .smalltalk import SYSTEM_PROMPTS
from .tasks import TASKS, example

LENGTHS = {128: 0.58, 256: 0.29, 512: 0.10, 1024: 0.03}  # row length: share of the tokens
FIRST_ONLY_BOOST = 4.0  # tool tasks can only open a row, so they open more of them
MISSES = 5  # a row ends after so many turns that did not fit
Row = tuple[list[int], list[float]]  # token ids and their weights in the loss
Batch = tuple[NDArray[np.int64], NDArray[np.float32]]

_NAMES = tuple(TASKS)


class Mixture:
    """Which task comes next. `changes` are weights to take instead of the table's."""

    def __init__(self, changes: Mapping[str, float] = MappingProxyType({})) -> None:
        weights = {name: task.weight for name, task in TASKS.items()} | dict(changes)
        assert weights.keys() == TASKS.keys(), weights.keys() - TASKS.keys()
        self._next = list(weights.values())
        self._first = [
            weight * (FIRST_ONLY_BOOST if TASKS[name].group == "tools" else 1)
            for name, weight in weights.items()
        ]

    def first_turn(self, rng: random.Random) -> Conversation:
        """The start of a conversation: a system prompt, now and then, and one example."""
        first = example(rng.choices(_NAMES, self._first)[0], rng, "train")
        system = first.system or (rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else "")
        head = [Message("system", system)] if system else []
        return Conversation([*head, *first.messages, first.answer], first.tools)

    def next_turn(self, rng: random.Random) -> list[Message]:
        """One more example, or nothing when the drawn one needs a system prompt of its own."""
        turn = example(rng.choices(_NAMES, self._next)[0], rng, "train")
        return [] if turn.system or turn.tools else [*turn.messages, turn.answer]


USUAL = Mixture()


def conversation(rng: random.Random, turns: int) -> Conversation:
    """A conversation of at most so many examples."""
    made = USUAL.first_turn(rng)
    for _ in range(turns - 1):
        made.messages += USUAL.next_turn(rng)
    return made


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, which must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def encode(tokenizer: Tokenizer, parts: Sequence[Segment]) -> Row:
    """Token ids, and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    turn = 0  # learnt tokens of the assistant's turn so far
    for part in parts:
        if part.special:
            new = [special_id(tokenizer, part.text)]
        else:
            new = tokenizer.encode(part.text, add_special_tokens=False).ids
        ids += new
        weights += [0.0] * len(new)
        turn = turn + len(new) if part.learn else 0
        if part.learn and part.text == END:
            weights[-turn:] = [turn**-0.5] * turn
    return ids, weights


def row(tokenizer: Tokenizer, rng: random.Random, length: int, mixture: Mixture = USUAL) -> Row:
    """One row of exactly `length + 1` tokens: inputs and, shifted by one, targets."""
    while True:
        ids, weights = encode(tokenizer, segments(mixture.first_turn(rng)))
        if len(ids) <= length + 1:
            break
    misses = 0
    while misses < MISSES:
        turn = mixture.next_turn(rng)
        more, more_weights = encode(tokenizer, segments(Conversation(turn))[1:])
        if turn and len(ids) + len(more) <= length + 1:
            ids += more
            weights += more_weights
        else:
            misses += 1
    fill = length + 1 - len(ids)
    return ids + [special_id(tokenizer, PAD)] * fill, weights + [0.0] * fill


def batches(
    tokenizer: Tokenizer,
    seed: str,
    tokens: int,
    lengths: dict[int, float],
    mixture: Mixture = USUAL,
) -> Iterator[Batch]:
    """Endless batches of `tokens` tokens, each of one row length."""
    rng = random.Random(f"train {seed}")
    while True:
        length = rng.choices(list(lengths), list(lengths.values()))[0]
        made = [row(tokenizer, rng, length, mixture) for _ in range(tokens // length)]
        ids = np.array([ids for ids, _ in made], dtype=np.int64)
        yield ids, np.array([weights for _, weights in made], dtype=np.float32)

"""The table of tasks: every generator with its share of the training turns."""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import tasks_basic as basic
from . import tasks_context as context
from . import tasks_tools as tools
from .example import Example, Generator, Split, draw
from .smalltalk import smalltalk
from .stories import story


@dataclass(frozen=True)
class Task:
    """A generator, how many of 100 training turns it gets, and the group it is reported in."""

    generate: Generator
    weight: float
    group: str


TASKS: dict[str, Task] = {
    "addition": Task(basic.addition, 7, "arithmetic"),
    "subtraction": Task(basic.subtraction, 6, "arithmetic"),
    "multiplication": Task(basic.multiplication, 2.5, "arithmetic"),
    "compare": Task(basic.compare, 1, "arithmetic"),
    "sort_numbers": Task(basic.sort_numbers, 5, "sorting"),
    "sort_words": Task(basic.sort_words, 6, "sorting"),
    "reverse": Task(basic.reverse, 7, "strings"),
    "letter": Task(basic.letter, 1.5, "strings"),
    "uppercase": Task(basic.uppercase, 2.5, "strings"),
    "count_letters": Task(basic.count_letters, 2.5, "strings"),
    "repeat": Task(basic.repeat, 4, "strings"),
    "spell": Task(basic.spell, 2.5, "strings"),
    "lookup": Task(context.lookup, 14, "lookup"),
    "lookup_owner": Task(context.lookup_owner, 4, "lookup"),
    "copy": Task(context.copy, 8, "strings"),
    "lookup_series": Task(context.lookup_series, 22, "lookup"),
    "closed_book": Task(context.closed_book, 1, "lookup"),
    "json": Task(context.json_answer, 6, "json"),
    "json_order": Task(context.json_order, 1, "json"),
    "dialogue": Task(context.dialogue, 3, "dialogue"),
    "tool_call": Task(tools.tool_call, 6, "tools"),
    "tool_result": Task(tools.tool_result, 2.5, "tools"),
    "story": Task(story, 2.5, "stories"),
    "chat": Task(smalltalk, 1.5, "chat"),
}


def example(name: str, rng: random.Random, split: Split) -> Example:
    """One example of the named task."""
    return draw(TASKS[name].generate, rng, split)


def held_out(name: str, count: int, seed: int = 0) -> list[Example]:
    """The evaluation examples of a task: the same ones for the same seed."""
    rng = random.Random(f"held-out {name} {seed}")
    return [example(name, rng, "held_out") for _ in range(count)]

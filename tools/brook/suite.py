"""Writes the held-out items that `penstock eval --tasks brook` asks, as one compact file.

Run: python -m brook.suite ../src/penstock/measure/quality/data/brook.jsonl
Items are held out by the hash of their key (`example.is_held_out`), so none was trained on, and
drawn with a seed of their own: the mixture of the training was steered by those of seed 0.
The first line says what the file is and holds the scores of the model card.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .chat import tool_text
from .example import Example
from .tasks import TASKS, example

SEED = 2026
COUNT = 200
MAX_DRAWS = 4_000  # a task with few instances has fewer items than COUNT
# Not asked: the conversation holds a tool's message, which not every chat server takes.
LEFT_OUT = frozenset({"tool_result"})
CARD = Path(__file__).parents[2] / "src/penstock/builtin/brook/MODEL_CARD.md"


def check_of(made: Example) -> dict[str, Any]:
    """How the answer is judged: the kind of check, and what it compares with."""
    if made.answer.call is not None:
        return {"call": made.answer.call}
    nonlocals = inspect.getclosurevars(made.check).nonlocals
    if "needed" in nonlocals:
        return {"story": list(nonlocals["needed"])}
    expected = nonlocals["expected"]
    return {"text": expected} if isinstance(expected, str) else {"json": expected}


def item(name: str, made: Example) -> dict[str, Any]:
    """One line. `turns` are the user's and the assistant's in turn, the last one to be answered."""
    parts = [made.system] if made.system else []
    if made.tools:  # as the template writes them, so that servers without tools can be asked
        parts.append(tool_text(made.tools))
    head = {"task": name, "key": made.key}
    if parts:
        head["system"] = "\n".join(parts)
    return head | {"turns": [message.content for message in made.messages]} | check_of(made)


def names_its_key(line: dict[str, Any]) -> bool:
    """Whether the question names what was held out: a story's hero and thing.

    "Tell me a story." and "... about Erik the bee." stand in the training's data, too.
    """
    return "story" not in line or set(line["key"].split(",")) <= set(line["story"])


def items(name: str) -> Iterator[dict[str, Any]]:
    """The held-out items of a task, none twice."""
    rng = random.Random(f"suite {name} {SEED}")
    seen: set[str] = set()
    for _ in range(MAX_DRAWS):
        line = item(name, example(name, rng, "held_out"))
        if not names_its_key(line):
            continue
        asked = json.dumps([line.get("system"), line["turns"]])
        if asked not in seen:
            seen.add(asked)
            yield line
        if len(seen) == COUNT:
            return


def card_scores() -> dict[str, list[float]]:
    """Score and number of items of each task in the model card."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+)% \| (\d+) \|", CARD.read_text(), re.MULTILINE)
    found: dict[str, list[float]] = {}
    for name, score, count in rows:  # tasks come first, groups of the same name later
        found.setdefault(name, [round(float(score) / 100, 4), int(count)])
    return {name: found[name] for name in TASKS if name not in LEFT_OUT}


def lines() -> Iterator[str]:
    """The file."""
    head = {
        "suite": "brook",
        "seed": SEED,
        "groups": {name: TASKS[name].group for name in TASKS if name not in LEFT_OUT},
        "model_card": card_scores(),
    }
    yield json.dumps(head)
    for name in TASKS:
        if name not in LEFT_OUT:
            for line in items(name):
                yield json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text("".join(line + "\n" for line in lines()), encoding="utf-8")


if __name__ == "__main__":
    main()

"""IFEval as a task: 541 prompts whose instructions a program can check, strict and loose.

Four figures, as published: the share of prompts all of whose instructions are followed, and the
share of instructions followed, each with the answer as it is (strict) and for the best of eight
readings of it (loose). The main score here is prompt-level strict.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.load.target import Ask, Reply
from penstock.measure.quality.ifeval.instructions import CHECKS, check
from penstock.measure.quality.jsonl import read_jsonl
from penstock.measure.quality.tasks import Item, ScoreFacts, TaskFacts, hash_of, sample

MAX_TOKENS = 1280  # of the Open LLM Leaderboard v2
PER_INSTRUCTION = ScoreFacts(weight="num_instructions")


def readings(text: str) -> list[str]:
    """The eight readings of a loose check: with or without the first line, the last line, stars."""
    lines = text.split("\n")
    cut = [
        text,
        "\n".join(lines[1:]).strip(),
        "\n".join(lines[:-1]).strip(),
        "\n".join(lines[1:-1]).strip(),
    ]
    return cut + [one.replace("*", "") for one in cut]


def strict(text: str, names: Sequence[str], arguments: Sequence[dict[str, Any]]) -> list[bool]:
    """Which instructions the answer follows as it is."""
    pairs = zip(names, arguments, strict=True)
    return [check(name, text, given) for name, given in pairs]


def loose(text: str, names: Sequence[str], arguments: Sequence[dict[str, Any]]) -> list[bool]:
    """Which instructions at least one reading of the answer follows."""
    every = readings(text)
    pairs = zip(names, arguments, strict=True)
    return [any(check(name, one, given) for one in every) for name, given in pairs]


class Ifeval:
    """The prompts of `eval-ifeval/input_data.jsonl`."""

    name = "ifeval"
    main_score = "prompt_strict"
    higher_is_better = True
    random_baseline = 0.0

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "eval-ifeval" / "input_data.jsonl"
        self._lines = read_jsonl(self._path, "key", "prompt", "instruction_id_list", "kwargs")
        for line in self._lines:
            if unknown := set(line["instruction_id_list"]) - set(CHECKS):
                raise ConfigError(
                    f"`{self._path}` has the instruction `{min(unknown)}`, which is not known."
                )

    @cached_property
    def _items(self) -> list[Item]:
        return [
            Item(
                id=str(line["key"]),
                ask=Ask(
                    prompt_id=str(line["key"]),
                    messages=[{"role": "user", "content": line["prompt"]}],
                    max_tokens=MAX_TOKENS,
                ),
                reference=[line["instruction_id_list"], line["kwargs"]],
                details={
                    "instructions": line["instruction_id_list"],
                    "num_instructions": len(line["instruction_id_list"]),
                },
            )
            for line in self._lines
        ]

    @property
    def data_hash(self) -> str:
        return hash_of(self._items)

    def facts(self, num_items: int) -> TaskFacts:
        return TaskFacts(
            name=self.name,
            main_score=self.main_score,
            scores={
                "prompt_strict": ScoreFacts(),
                "prompt_loose": ScoreFacts(),
                "instruction_strict": PER_INSTRUCTION,
                "instruction_loose": PER_INSTRUCTION,
            },
            random_baseline=self.random_baseline,
            data_hash=self.data_hash,
            data_source="IFEval",
            num_items=num_items,
        )

    def items(self, limit: int | None = None, seed: int = 0) -> list[Item]:
        return sample(self._items, limit, seed)

    def grade(self, item: Item, reply: Reply) -> dict[str, float]:
        """Prompt-level scores are 0 or 1, instruction-level ones the share of the prompt's."""
        names, arguments = item.reference
        scores: dict[str, float] = {}
        for kind, followed in (
            ("strict", strict(reply.text, names, arguments)),
            ("loose", loose(reply.text, names, arguments)),
        ):
            scores[f"prompt_{kind}"] = float(all(followed))
            scores[f"instruction_{kind}"] = sum(followed) / len(followed)
        return scores

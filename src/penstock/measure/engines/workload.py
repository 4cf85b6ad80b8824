"""What every arm is asked: the same lengths in the same order, other prompts in each round.

Owns lengths and prompts. Where an engine takes token ids, prompts are ids and exactly as long as
asked; elsewhere they are words, and the row says how many tokens they were.
Invariant: within a run no prompt is sent to an arm twice, so that no prefix cache helps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec

from penstock.builtin import NAMES, path
from penstock.errors import ConfigError
from penstock.measure.engines.arms import IN_PROCESS, ArmSpec
from penstock.measure.engines.recipes import RECIPES
from penstock.measure.load.target import Ask
from penstock.measure.load.traces import read_trace
from penstock.measure.load.words import GUESS, Words

NUM_WARM_UP = 2


class Length(NamedTuple):
    """Tokens of one prompt and of its answer."""

    num_in: int
    num_out: int

    def __str__(self) -> str:
        return f"{self.num_in}x{self.num_out}"


class Work(NamedTuple):
    """One stage of a round: these lengths, this many at a time."""

    kind: str  # `latency` or `throughput`
    stage: str
    lengths: tuple[Length, ...]
    concurrency: int

    def settings(self) -> dict[str, Any]:
        """For the run's header."""
        return {
            "kind": self.kind,
            "stage": self.stage,
            "num_requests": len(self.lengths),
            "concurrency": self.concurrency,
            "num_in": sum(length.num_in for length in self.lengths),
            "num_out": sum(length.num_out for length in self.lengths),
        }


class Clipped(NamedTuple):
    """Lengths of a trace as they fit into a context, and what was done to them."""

    lengths: tuple[Length, ...]
    facts: dict[str, Any]  # for the run's header


def parse_lengths(text: str, option: str) -> list[Length]:
    """Read `512x64,2048x128`: tokens of prompt and answer.

    Raises:
        ConfigError: it is something else; the message names the option.
    """
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        if match is None or not int(match[1]) or not int(match[2]):
            raise ConfigError(
                f"`{option}` is `{text}`; `{part}` is no pair of lengths.",
                hint="such as `512x64`: 512 tokens of prompt, 64 of answer",
            )
        lengths.append(Length(int(match[1]), int(match[2])))
    return lengths


def trace_lengths(path: Path, num: int, *, context_len: int, seed: int) -> Clipped:
    """Lengths of `num` requests of a trace, drawn without replacement, clipped to a context.

    An answer keeps its length and the prompt loses tokens, unless the answer alone fills half of
    the context.

    Raises:
        ConfigError: the trace cannot be read, or has fewer requests with lengths.
    """
    trace = read_trace(path)
    known = [
        Length(max(1, arrival.num_in), max(1, arrival.num_out))
        for arrival in trace.arrivals
        if arrival.num_in is not None and arrival.num_out is not None
    ]
    if len(known) < num:
        raise ConfigError(f"The trace `{path}` has `{len(known)}` lengths, fewer than `{num}`.")
    drawn = Random(f"{seed}/trace").sample(known, num)
    clipped = [_clip(length, context_len) for length in drawn]
    facts = {
        "trace": path.name,
        "trace_kind": trace.kind,
        "sha256": trace.sha256,
        "num_of_trace": len(known),
        "num_drawn": num,
        "context_len": context_len,
        "num_clipped": sum(old != new for old, new in zip(drawn, clipped, strict=True)),
    }
    return Clipped(tuple(clipped), facts)


def _clip(length: Length, context_len: int) -> Length:
    num_out = min(length.num_out, max(context_len // 2, context_len - length.num_in, 1))
    return Length(min(length.num_in, context_len - num_out), num_out)


def vocab_size(specs: Sequence[ArmSpec]) -> int | None:
    """The smallest vocabulary of the arms whose models can be read here; None: of none."""
    sizes = []
    for spec in specs:
        directory = model_directory(spec)
        if directory is None or not (directory / "config.json").is_file():
            continue
        try:
            config = msgspec.json.decode((directory / "config.json").read_bytes(), type=dict)
        except (OSError, msgspec.DecodeError):
            continue  # whoever loads it says what is wrong with it
        if isinstance(size := config.get("vocab_size"), int):
            sizes.append(size)
    return min(sizes, default=None)


def model_directory(spec: ArmSpec) -> Path | None:
    """Where the model of an arm lies, if it is a directory here."""
    if spec.kind not in RECIPES and spec.kind != IN_PROCESS:
        return None
    if spec.kind in ("penstock", IN_PROCESS) and spec.location in NAMES:
        return path(spec.location)
    directory = Path(spec.location).expanduser()
    return directory if directory.is_dir() else None


def takes_token_ids(spec: ArmSpec) -> bool:
    """Whether an arm can be asked with token ids, as far as its recipe knows."""
    return spec.kind == IN_PROCESS or (spec.is_started and RECIPES[spec.kind].takes_token_ids)


def asks(
    lengths: Sequence[Length],
    *,
    name: str,
    seed: int,
    vocab: int | None,
    words: Words = GUESS,
    chat: bool = False,
) -> list[Ask]:
    """Prompts of these lengths; other ones for each `name`.

    Args:
        vocab: prompts are ids below this; None: words.
        chat: words are the message of a user.
    """
    made = []
    for index, length in enumerate(lengths):
        chance = Random(f"{seed}/{name}/{index}")
        prompt: str | list[int]
        if vocab is not None:
            prompt = chance.choices(range(vocab), k=length.num_in)
        else:
            prompt = " ".join(chance.choices(words.words, k=words.num_words(length.num_in)))
        ask = Ask(
            prompt_id=f"{name}-{index}",
            prompt=None if chat else prompt,
            messages=[{"role": "user", "content": prompt}] if chat else None,
            max_tokens=length.num_out,
            fixed_length=True,
        )
        made.append(ask)
    return made

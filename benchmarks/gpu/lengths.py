"""Lengths of 1,000 real conversations: prompt and answer tokens of each request.

Owns the reading of a trace and the distribution that stands in where there is none. The trace is
the conversation part of the Azure LLM inference trace 2023 (Patel et al. 2024, Splitwise;
CC BY 4.0): 19,366 requests with a mean of 1,155 tokens in and 211 out. Prompts and answers there
are nearly independent (rank correlation 0.07), so the stand-in draws each from its own quantiles.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TRACE = Path("traces-azure-llm-2023", "AzureLLMInferenceTrace_conv.csv")  # in PENSTOCK_DATA
COLUMNS = ("ContextTokens", "GeneratedTokens")

# The trace's quantiles: steps of 1/20 to 0.95, then these. Linear in between.
_TAIL = (0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
_AT = (*(step / 20 for step in range(20)), *_TAIL)
_PROMPTS = (
    *(2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315),
    *(1876, 2734, 4083, 4086, 4090, 4098, 4142, 4831, 6179, 14050),
)
_ANSWERS = (
    *(7, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424, 451),
    *(468, 509, 540, 601, 643, 954, 1000),
)


class Lengths(NamedTuple):
    """Tokens of each request, and where they are from."""

    requests: list[tuple[int, int]]  # tokens of the prompt, of the answer
    source: str

    @property
    def num_tokens(self) -> int:
        """Prompts and answers together."""
        return sum(map(sum, self.requests))


def take(num_requests: int, file: Path | None = None, seed: int = 0) -> Lengths:
    """The lengths of `num_requests` requests: of `file`, of the trace, or drawn.

    Args:
        file: CSV with the columns `COLUMNS`; None: the trace, if PENSTOCK_DATA holds it.
    """
    if file is None and (data := os.environ.get("PENSTOCK_DATA")):
        file = Path(data, TRACE) if Path(data, TRACE).exists() else None
    if file is None:
        source = "drawn from quantiles of the Azure conversation trace 2023"
        return Lengths(drawn(num_requests, seed), source)
    with file.open() as lines:
        found = [(int(row[COLUMNS[0]]), int(row[COLUMNS[1]])) for row in csv.DictReader(lines)]
    if len(found) < num_requests:
        raise ValueError(f"{file} has {len(found)} requests, fewer than {num_requests}")
    return Lengths(found[:num_requests], f"the first {num_requests} of {file.name}")


def drawn(num_requests: int, seed: int) -> list[tuple[int, int]]:
    """Lengths from the quantiles: the same for the same seed on every machine."""
    rng = random.Random(seed)
    return [
        (_quantile(_PROMPTS, rng.random()), _quantile(_ANSWERS, rng.random()))
        for _ in range(num_requests)
    ]


def _quantile(values: Sequence[int], at: float) -> int:
    """The inverse of the cumulative distribution at `at`, rounded."""
    last = next(index for index, step in enumerate(_AT) if step > at)
    low, high = _AT[last - 1], _AT[last]
    share = (at - low) / (high - low)
    return round(values[last - 1] + share * (values[last] - values[last - 1]))

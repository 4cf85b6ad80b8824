"""What the scheduler tells the runner, and what the runner answers: small values, no tensors.

A plan is all that another rank needs to stay in step with the first one.
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.types import SamplingParams, TokenLogprobs


class Slice(NamedTuple):
    """Tokens [start, start + length) of the request in `row` are computed in this step.

    A token is sampled after it if `start + length` is the number of tokens the row holds.
    """

    row: int
    start: int
    length: int


class Admission(NamedTuple):
    """A request takes a row: what the device state must know of it."""

    row: int
    token_ids: list[int]  # prompt, and after a preemption what was generated before it
    num_prompt: int
    params: SamplingParams
    seed: int


class StepPlan(NamedTuple):
    """One step. The runner applies `released`, `admitted`, `new_blocks` in this order."""

    slices: list[Slice]
    admitted: list[Admission]
    released: list[int]  # rows given up since the plan before; may name free ones
    new_blocks: list[tuple[int, list[int]]]  # (row, block ids appended to its table)


class StepResult(NamedTuple):
    """What the step gave, by row."""

    token_ids: dict[int, list[int]]
    logprobs: dict[int, list[TokenLogprobs]]
    # For prompt position start+1 .. start+length of the slice, where a row asked for them.
    prompt_logprobs: dict[int, list[TokenLogprobs]]

"""Executes plans: the protocol, and state, batch, model, sampler on the CPU.

Common to every model and every feature: feature logic lives elsewhere; a line added here needs a
reason in the commit. Knows rows, and neither requests nor scheduling: a plan is all it is told.
Invariant: after `execute`, the state holds the tokens of this step, also for rows whose request
has gone meanwhile; a later plan releases those.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from penstock.engine.batch import StepBatch, next_batch
from penstock.engine.memory import PROMPT_LOGPROB_ROWS
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.state import DeviceState
from penstock.models.base import Model
from penstock.sampling import host as sampler
from penstock.types import TokenLogprobs


class Step(Protocol):
    """A step that was launched."""

    def read(self) -> StepResult:
        """Wait until it is done. Called once, in the order of the steps, or never."""


class Runner(Protocol):
    """Executes plans, in their order. Whoever follows the same plans holds the same state."""

    @property
    def description(self) -> str:
        """Who computes, on what, for people: `native, avx512, 2 threads`."""

    @property
    def depth(self) -> int:
        """How many steps may be launched before the first of them is read; 0: it reads at once."""

    def check(self) -> None:
        """Raise what keeps it from launching another step, if anything does."""

    def launch(self, plan: StepPlan) -> Step:
        """Begin a step, behind all that were launched before; plans without slices only apply."""


class Done(NamedTuple):
    """Implements `Step`: it was computed when it was launched."""

    result: StepResult

    def read(self) -> StepResult:
        """What it gave."""
        return self.result


class HostRunner:
    """Implements `Runner` for a model on the CPU, which brings its KV store."""

    depth = 0

    def __init__(self, model: Model, state: DeviceState, eos_token_ids: tuple[int, ...]) -> None:
        self.model = model
        self._state = state
        self._eos_token_ids = eos_token_ids
        self._last: StepBatch | None = None  # the batch of the step before, if it came to its end

    @property
    def description(self) -> str:
        """That of the model."""
        return self.model.description

    def check(self) -> None:
        """Nothing can have happened to it."""

    def launch(self, plan: StepPlan) -> Done:
        """Compute the step."""
        return Done(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the slices of `plan`; sample after those that reach the end of their row."""
        state = self._state
        last, self._last = self._last, None
        state.apply(plan)
        if not plan.slices:
            return StepResult({}, {}, {})
        batch = next_batch(last, plan, state)
        self.model.forward(batch.forward)
        prompt_logprobs = {} if batch is last else self._prompt_logprobs(batch)
        rows = batch.sampled_rows
        if not len(rows):
            return StepResult({}, {}, prompt_logprobs)
        logits = self.model.logits(batch.forward.logit_rows)
        if batch.plain:
            sampled = sampler.SampleResult(logits.argmax(axis=1), {})
        else:
            sampled = sampler.sample(logits, rows, state, self._eos_token_ids, self.model.choose)
        token_ids = dict(zip(rows.tolist(), sampled.token_ids.tolist(), strict=True))
        state.append(token_ids)
        self._last = batch
        return StepResult(
            {row: [token_id] for row, token_id in token_ids.items()},
            {row: [logprob] for row, logprob in sampled.logprobs.items()},
            prompt_logprobs,
        )

    def _prompt_logprobs(self, batch: StepBatch) -> dict[int, list[TokenLogprobs]]:
        """By row that asks for it: of prompt tokens start+1 .. start+length of its slice."""
        state = self._state
        found: dict[int, list[TokenLogprobs]] = {}
        for index in state.wants_prompt_logprobs[batch.rows].nonzero()[0].tolist():
            row = int(batch.rows[index])
            first = int(batch.forward.query_start[index])
            end = batch.forward.context_lens[index]
            start = end - batch.forward.lengths[index]
            targets = state.token_ids[row, start + 1 : min(end + 1, int(state.num_prompt[row]))]
            params = state.params[row]
            assert params is not None
            assert params.prompt_logprobs is not None
            found[row] = []
            for offset in range(0, len(targets), PROMPT_LOGPROB_ROWS):
                piece = targets[offset : offset + PROMPT_LOGPROB_ROWS]
                at = first + offset
                logits = self.model.logits(np.arange(at, at + len(piece)))
                found[row] += sampler.prompt_logprobs(logits, piece, params.prompt_logprobs)
        return found

"""What the device knows of every running request: permanent rows of arrays.

A request keeps its row from admission to release; steps gather from rows, they never move them.
Owns token ids, block tables and sampling settings by row; knows no request and no scheduling:
it follows the `StepPlan`s, so that every rank that applies the same plans holds the same state.
The arrays are numpy: indexing rows costs a fraction of what torch asks, and `torch.from_numpy`
shares the memory.
Invariant: for a row in use, `token_ids[row, :num_tokens[row]]` are the tokens of its request.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.engine.plan import Admission, StepPlan
from penstock.types import SamplingParams

_UINT64 = 2**64 - 1


class TokenRules(NamedTuple):
    """What a row's parameters say of single tokens: arrays, made once and not in every step."""

    allowed: NDArray[np.int64] | None
    banned: NDArray[np.int64]
    stops: NDArray[np.int64]
    biased: NDArray[np.int64]
    biases: NDArray[np.float32]

    @classmethod
    def of(cls, params: SamplingParams) -> TokenRules:
        """The rules of a request."""
        allowed, bias = params.allowed_token_ids, params.logit_bias or {}
        return cls(
            None if allowed is None else np.array(allowed, np.int64),
            np.array(params.banned_token_ids, np.int64),
            np.array(params.stop_token_ids, np.int64),
            np.fromiter(bias.keys(), np.int64),
            np.fromiter(bias.values(), np.float32),
        )


_NO_RULES = TokenRules.of(SamplingParams())


class DeviceState:
    """Rows for `max_num_seqs` requests of up to `max_model_len` tokens each.

    Every array's first dimension is the row. Readers may gather from all of them; only `apply`
    and `append` write.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        rows = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        max_num_blocks = -(-max_model_len // block_size)
        self.token_ids: NDArray[np.int64] = np.zeros((rows, max_model_len), np.int64)
        self.num_tokens: NDArray[np.int32] = np.zeros(rows, np.int32)
        self.num_prompt: NDArray[np.int32] = np.zeros(rows, np.int32)
        self.block_table: NDArray[np.int32] = np.zeros((rows, max_num_blocks), np.int32)
        self.num_blocks: NDArray[np.int32] = np.zeros(rows, np.int32)

        self.params: list[SamplingParams | None] = [None] * rows
        self.token_rules: list[TokenRules] = [_NO_RULES] * rows
        self.greedy: NDArray[np.bool_] = np.ones(rows, np.bool_)
        self.temperature: NDArray[np.float32] = np.ones(rows, np.float32)
        self.top_k: NDArray[np.int32] = np.zeros(rows, np.int32)  # 0 = all
        self.top_p: NDArray[np.float32] = np.ones(rows, np.float32)
        self.min_p: NDArray[np.float32] = np.zeros(rows, np.float32)
        self.typical_p: NDArray[np.float32] = np.ones(rows, np.float32)
        self.seed: NDArray[np.uint64] = np.zeros(rows, np.uint64)
        self.num_logprobs: NDArray[np.int32] = np.full(rows, -1, np.int32)  # -1 = none asked for
        self.constrained: NDArray[np.bool_] = np.zeros(rows, np.bool_)  # see `is_constrained`
        # Greedy, unconstrained, no log-probabilities: the most likely token is all there is to do.
        self.plain: NDArray[np.bool_] = np.zeros(rows, np.bool_)
        self.wants_prompt_logprobs: NDArray[np.bool_] = np.zeros(rows, np.bool_)

    @staticmethod
    def bytes_for(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
        """About what the arrays will take, without making them."""
        return max_num_seqs * (max_model_len * 8 + -(-max_model_len // block_size) * 4 + 64)

    def apply(self, plan: StepPlan) -> None:
        """Follow the plan: rows given up, rows taken, blocks appended, in this order."""
        for row in plan.released:
            self._release(row)
        for admission in plan.admitted:
            self._admit(admission)
        for row, block_ids in plan.new_blocks:
            start = self.num_blocks[row]
            self.block_table[row, start : start + len(block_ids)] = block_ids
            self.num_blocks[row] = start + len(block_ids)

    def append(self, token_ids: dict[int, int]) -> None:
        """Write a new token by row: with cold caches a loop is faster than indexing with arrays."""
        for row, token_id in token_ids.items():
            end = self.num_tokens.item(row)
            self.token_ids[row, end] = token_id
            self.num_tokens[row] = end + 1

    def _release(self, row: int) -> None:
        self.params[row], self.token_rules[row] = None, _NO_RULES
        self.num_tokens[row] = 0
        self.num_blocks[row] = 0
        self.wants_prompt_logprobs[row] = False

    def _admit(self, admission: Admission) -> None:
        row, params = admission.row, admission.params
        assert self.params[row] is None, f"row {row} is taken"
        num_tokens = len(admission.token_ids)
        self.token_ids[row, :num_tokens] = admission.token_ids
        self.num_tokens[row] = num_tokens
        self.num_prompt[row] = admission.num_prompt

        self.params[row] = params
        self.token_rules[row] = TokenRules.of(params)
        self.greedy[row] = params.greedy
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.typical_p[row] = params.typical_p
        self.seed[row] = admission.seed & _UINT64
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.constrained[row] = is_constrained(params)
        self.plain[row] = params.greedy and params.logprobs is None and not is_constrained(params)
        self.wants_prompt_logprobs[row] = params.prompt_logprobs is not None


def is_constrained(params: SamplingParams) -> bool:
    """Whether the logits of the row are changed before its temperature counts."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.min_tokens > 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.banned_token_ids)
    )

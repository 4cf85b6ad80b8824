"""What sampling must know of every running request: permanent rows of arrays.

Owns token ids and sampling settings by row. The arrays are numpy: indexing rows costs a fraction of
what torch asks, and `torch.from_numpy` shares the memory.
Invariant: `token_ids[row, :num_tokens[row]]` are the tokens of the request in a row; beside a
device that keeps a table of its own, no more of them than it was admitted with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class SamplingRows:
    """Rows for `num_rows` requests of up to `max_model_len` tokens each.

    Every array's first dimension is the row. Readers may gather from all of them; only `admit`,
    `release` and `append` write.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        rows = num_rows
        self.max_model_len = max_model_len
        self.token_ids: NDArray[np.int64] = np.zeros((rows, max_model_len), np.int64)
        self.num_tokens: NDArray[np.int32] = np.zeros(rows, np.int32)
        self.num_prompt: NDArray[np.int32] = np.zeros(rows, np.int32)

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

    def admit(
        self, row: int, token_ids: list[int], num_prompt: int, params: SamplingParams, seed: int
    ) -> None:
        """Let a request take a free row: its tokens so far, of which `num_prompt` are prompt."""
        assert self.params[row] is None, f"row {row} is taken"
        num_tokens = len(token_ids)
        self.token_ids[row, :num_tokens] = token_ids
        self.num_tokens[row] = num_tokens
        self.num_prompt[row] = num_prompt

        self.params[row] = params
        self.token_rules[row] = TokenRules.of(params)
        self.greedy[row] = params.greedy
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.typical_p[row] = params.typical_p
        self.seed[row] = seed & _UINT64
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.constrained[row] = is_constrained(params)
        self.plain[row] = params.greedy and params.logprobs is None and not is_constrained(params)
        self.wants_prompt_logprobs[row] = params.prompt_logprobs is not None

    def release(self, row: int) -> None:
        """Give a row up; it may be free already."""
        self.params[row], self.token_rules[row] = None, _NO_RULES
        self.num_tokens[row] = 0
        self.wants_prompt_logprobs[row] = False

    def append(self, token_ids: dict[int, int]) -> None:
        """Write a new token by row: with cold caches a loop is faster than indexing with arrays."""
        for row, token_id in token_ids.items():
            end = self.num_tokens.item(row)
            self.token_ids[row, end] = token_id
            self.num_tokens[row] = end + 1


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

"""Values that cross the borders between processes and layers. Standard library only.

The engine core knows token ids only: of `SamplingParams` it reads everything but the block
marked "text", which is handled in front of it (`penstock.text`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from penstock.errors import InvalidField

MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client left or asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token. Names and meanings are those of vLLM and the OpenAI API.

    Raises:
        InvalidField: a value is out of range; `.field` names it.
    """

    n: int = 1  # answers a prompt; fanned out in front of the core by `for_sample`
    max_tokens: int | None = 16  # None: up to the model's context
    min_tokens: int = 0  # before that many tokens, end and stop tokens are not sampled
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0  # locally typical sampling, Meister et al. 2022
    repetition_penalty: float = 1.0  # over prompt and answer, Keskar et al. 2019
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None  # None: drawn when the request is admitted
    logprobs: int | None = None  # 0: of the sampled token only; k: and of the k most likely
    prompt_logprobs: int | None = None
    # text: read by `penstock.text`, never by the core
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_int(self, "n", 1, 128)
        if self.max_tokens is not None:
            _check_int(self, "max_tokens", 1, None)
        _check_int(self, "min_tokens", 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidField(
                f"`min_tokens` is `{self.min_tokens}`, more than `max_tokens` = "
                f"`{self.max_tokens}`.",
                field="min_tokens",
            )
        _check_float(self, "temperature", 0.0, 100.0)
        _check_int(self, "top_k", 0, None)
        _check_float(self, "top_p", 0.0, 1.0, open_low=True)
        _check_float(self, "min_p", 0.0, 1.0)
        _check_float(self, "typical_p", 0.0, 1.0, open_low=True)
        _check_float(self, "repetition_penalty", 0.0, 10.0, open_low=True)
        _check_float(self, "presence_penalty", -2.0, 2.0)
        _check_float(self, "frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            _check_int(self, "seed", -MAX_SEED - 1, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(self, name, 0, 1000)
        _check_ids(self)
        if any(not text for text in self.stop):
            raise InvalidField("`stop` holds an empty string.", field="stop")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a random one."""
        return self.temperature < 1e-5

    def for_sample(self, index: int) -> SamplingParams:
        """The parameters of answer `index` of `n`: one answer, its own seed."""
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + index) % MAX_SEED
        return replace(self, n=1, seed=seed)


def _reject(params: SamplingParams, name: str, wanted: str) -> InvalidField:
    return InvalidField(
        f"`{name}` is `{getattr(params, name)!r}`; it must be {wanted}.", field=name
    )


def _check_int(params: SamplingParams, name: str, low: int, high: int | None) -> None:
    value = getattr(params, name)
    wanted = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise _reject(params, name, wanted)
    if value < low or (high is not None and value > high):
        raise _reject(params, name, wanted)


def _check_float(
    params: SamplingParams, name: str, low: float, high: float, *, open_low: bool = False
) -> None:
    value = getattr(params, name)
    wanted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _reject(params, name, wanted)
    if value < low or value > high or (open_low and value == low):
        raise _reject(params, name, wanted)


def _check_ids(params: SamplingParams) -> None:
    for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids", "logit_bias"):
        for token_id in getattr(params, name) or ():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise _reject(params, name, "token ids, integers of at least 0")
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise _reject(params, "allowed_token_ids", "at least one token id")
    for bias in (params.logit_bias or {}).values():
        if not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise _reject(params, "logit_bias", "numbers in [-100, 100]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt for the engine, already tokenized; `params.n` is 1."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower goes first; only the priority policy reads it
    salt: str = ""  # requests share cached prefixes only with those of the same salt


class TokenLogprobs(NamedTuple):
    """The log-probability of one token, from the raw logits (before penalties, temperature)."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class Usage(NamedTuple):
    """What a request has used so far."""

    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens whose KV came from the prefix cache
    num_generated_tokens: int
    queue_s: float  # from arrival to the first step that computed a token of it


class TokenEvent(NamedTuple):
    """What one step produced for one request. The last event of a request has `finish`."""

    request_id: str
    token_ids: list[int]
    usage: Usage
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, which is also in token_ids
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, whole; [0] is None


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Gauges and counters of an engine; the counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0  # held by live requests
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed
    num_generated_tokens: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_chunks: int = 0  # slices that did not reach the end of their request
    last_step_s: float = 0.0  # time.monotonic() when the last step ended


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a front end must know of an engine."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    plan: tuple[str, ...] = field(default=())  # the memory plan, one line each
    startup_s: Mapping[str, float] = field(default_factory=dict)  # seconds by phase

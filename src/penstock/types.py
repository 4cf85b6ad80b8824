"""Values that cross the borders between processes and layers. Standard library only.

The engine core knows token ids only: of `SamplingParams` it reads everything but the block
marked "text", which is handled in front of it (`penstock.text`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from penstock.errors import InvalidField

MAX_SEED = 2**63 - 1
MAX_INT = 2**31 - 1  # of token ids and counts: what the engine's arrays hold


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client left or asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token. Names and meanings are those of vLLM and the OpenAI API.

    Where a tuple stands, any list will do, and for `stop` a single string.

    Raises:
        InvalidField: a value has the wrong type or is out of range; `.field` names it.
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
            _check_int(self, "max_tokens", 1, MAX_INT)
        _check_int(self, "min_tokens", 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidField(
                f"`min_tokens` is `{self.min_tokens}`, more than `max_tokens` = "
                f"`{self.max_tokens}`.",
                field="min_tokens",
            )
        _check_float(self, "temperature", 0.0, 100.0)
        _check_int(self, "top_k", 0, MAX_INT)
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
        _check_logit_bias(self)
        _check_stop(self)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _reject(self, name, "true or false")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a random one."""
        return self.temperature < 1e-5

    def for_sample(self, index: int) -> SamplingParams:
        """The parameters of answer `index` of `n`: one answer with a seed of its own.

        What is asked of the prompt is told with answer 0 only.
        """
        if self.n == 1:
            return self
        seed = self.seed
        if seed is not None and index:
            seed = (seed + index + MAX_SEED + 1) % (2 * (MAX_SEED + 1)) - MAX_SEED - 1
        sample = copy.copy(self)  # not `replace`: what is valid need not be checked n times more
        object.__setattr__(sample, "n", 1)
        object.__setattr__(sample, "seed", seed)
        if index:
            object.__setattr__(sample, "prompt_logprobs", None)
        return sample


def _reject(params: SamplingParams, name: str, wanted: str) -> InvalidField:
    return InvalidField(
        f"`{name}` is `{getattr(params, name)!r}`; it must be {wanted}.", field=name
    )


def _check_int(params: SamplingParams, name: str, low: int, high: int) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _reject(params, name, f"an integer in [{low}, {high}]")


def _check_float(
    params: SamplingParams, name: str, low: float, high: float, *, open_low: bool = False
) -> None:
    value = getattr(params, name)
    wanted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _reject(params, name, wanted)
    if value < low or value > high or (open_low and value == low):
        raise _reject(params, name, wanted)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


def _check_ids(params: SamplingParams) -> None:
    for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        token_ids = getattr(params, name)
        if token_ids is None and name == "allowed_token_ids":
            continue
        if not isinstance(token_ids, (list, tuple)) or not all(map(_is_id, token_ids)):
            raise _reject(params, name, "a list of token ids")
        object.__setattr__(params, name, tuple(token_ids))
    if params.allowed_token_ids == ():
        raise _reject(params, "allowed_token_ids", "at least one token id")


def _check_logit_bias(params: SamplingParams) -> None:
    if params.logit_bias is None:
        return
    wanted = "a map from token ids to numbers in [-100, 100]"
    if not isinstance(params.logit_bias, Mapping):
        raise _reject(params, "logit_bias", wanted)
    for token_id, bias in params.logit_bias.items():
        if not _is_id(token_id) or isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise _reject(params, "logit_bias", wanted)
        if not -100 <= bias <= 100:
            raise _reject(params, "logit_bias", wanted)


def _check_stop(params: SamplingParams) -> None:
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
        raise _reject(params, "stop", "a string or a list of strings")
    if "" in stop:
        raise InvalidField("`stop` holds an empty string.", field="stop")
    object.__setattr__(params, "stop", tuple(stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt for the engine, already tokenized; `params.n` is 1."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower goes first; only the priority policy reads it
    salt: str = ""  # requests share cached prefixes only with those of the same salt
    # Of a pair for an engine that pools: where the second text begins; 0: it is one text. Such an
    # engine reads nothing of `params`, `priority` and `salt`.
    second_start: int = 0


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
    vector: bytes | None = None  # of an engine that pools: float32, little-endian


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
class PoolingInfo:
    """What an engine that pools answers a text with: an embedding, or scores of labels."""

    kind: str  # cls, mean, max, mean_sqrt_len or last: which hidden states it takes
    size: int  # numbers of an answer
    is_classifier: bool  # they are scores
    is_normalised: bool = False  # they are a vector of length 1
    # To how many of its first numbers an embedding may be cut: (): any; None: it may not.
    dimensions: tuple[int, ...] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)  # put before a text, by name
    default_prompt: str | None = None  # the name of the one that is put if none is named
    is_lowercased: bool = False  # texts are, prompts included, before they are tokenized
    labels: tuple[str, ...] = ()  # names of the scores


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
    backend: str = ""
    quantization: str = "none"
    kv_cache_dtype: str = ""
    pooling: PoolingInfo | None = None  # None: it generates
    plan: tuple[str, ...] = field(default=())  # the memory plan, one line each
    startup_s: Mapping[str, float] = field(default_factory=dict)  # seconds by phase

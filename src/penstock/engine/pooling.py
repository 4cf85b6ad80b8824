"""The engine of models that pool: texts in, one vector a text out, some texts a step.

Owns the queue of texts and the packing of steps. A text is computed whole, in the step in which it
is taken, in slots of the KV store that hold for that step alone: nothing outlives it. Implements
`engine.loop.Core`, so that threads, processes and clients are those of the engine that generates.
Invariant: a text that `add` refuses leaves no trace, and a step that fails leaves its texts where
they were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, islice
from operator import index
from typing import NamedTuple, Self, final

import numpy as np

from penstock.engine.backends import passed_over
from penstock.engine.config import EngineConfig
from penstock.engine.core import check_address, check_ids
from penstock.engine.locate import locate
from penstock.engine.memory import available_bytes, plan_memory
from penstock.errors import ConfigError, ContextTooLong, InvalidField, UnsupportedModel
from penstock.models.base import Model
from penstock.models.batch import ForwardBatch
from penstock.models.checkpoint import precision
from penstock.models.files import read_config
from penstock.models.load import Backends, load_model, timed
from penstock.models.pooling import (
    F32,
    PoolingSpec,
    activated,
    normalised,
    pooled,
    read_pooling,
    rows_of,
)
from penstock.models.spec import ModelSpec
from penstock.types import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    PoolingInfo,
    TokenEvent,
    Usage,
)

# What an engine without a cache has no use for, and the only value that asks for nothing.
_UNUSED = {
    "kv_cache_memory_bytes": None,
    "num_blocks": None,
    "long_prefill_token_threshold": 0,
    "scheduling_policy": "fcfs",
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": None,
    "async_scheduling": None,
    "enforce_eager": False,
    "attention_backend": "auto",
}
_NO_ROWS = np.empty(0, np.int64)


class _Text(NamedTuple):
    token_ids: list[int]
    second_start: int
    arrival_s: float


@final
class PoolingCore:
    """One model that pools the texts of many requests. Not thread-safe: one thread calls it."""

    def __init__(
        self, config: EngineConfig, info: EngineInfo, model: Model, pooling: PoolingSpec
    ) -> None:
        """Put an engine together from its parts; `from_config` makes them from a checkpoint.

        Args:
            config: the settings, resolved.
            info: what the engine is.
            model: with a KV store of `info.num_blocks` blocks.
        """
        self.info = info
        self.stats = EngineStats(num_blocks=info.num_blocks)
        self._model = model
        self._pooling = pooling
        self._max_tokens = config.max_num_batched_tokens
        self._waiting: dict[str, _Text] = {}  # in the order of their arrival

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """Plan the memory, load the model, compute one text.

        Raises:
            ConfigError: a setting is wrong, or there is no such model.
            ModelLoadError: the checkpoint cannot be used.
            NotEnoughMemory: it would not fit. Nothing has been loaded then.
        """
        phases: dict[str, float] = {}
        config = locate(config)
        path = config.path
        with timed(phases, "plan"):
            read = read_config(path)
            spec = ModelSpec.from_hf(read)
            if spec.is_foreign:
                raise UnsupportedModel(
                    f"`{spec.architecture}` is computed by transformers' modules, and those are "
                    "not pooled.",
                    hint="docs/models.md lists the architectures of our own.",
                )
            pooling = read_pooling(path, spec, read)
            backends = Backends(spec, pools=True)
            asked = config.backend
            config = _resolved(config, spec, pooling, backends)
            memory = plan_memory(spec, config, available_bytes(config), precision(path, read))
        model = load_model(
            path,
            backend=config.backend,
            dtype=config.dtype,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            num_slots=memory.num_blocks * config.block_size,
            max_num_tokens=config.max_num_batched_tokens,
            max_num_logit_rows=1,
            num_threads=config.num_threads,
            load_format=config.load_format,
            weight_cache=config.weight_cache,
            phases=phases,
        )
        info = EngineInfo(
            model=config.model,
            max_model_len=config.context_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=(),
            dtype=config.dtype,
            block_size=config.block_size,
            num_blocks=memory.num_blocks,
            max_num_seqs=config.max_num_seqs,
            backend=config.backend,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            pooling=_info(spec, pooling),
            plan=(
                f"backend    {model.description}{passed_over(asked, config.backend, backends)}",
                *memory.lines,
                _pooling_line(spec, pooling, config),
            ),
            startup_s=phases,
        )
        core = cls(config, info, model, pooling)
        with timed(phases, "warmup"):
            core._vectors([_Text([0], 0, 0.0)])
        return core

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting)

    def add(self, request: EngineRequest) -> None:
        """Take a text; its vector comes out of one of the next steps.

        Raises:
            RequestError: it is wrong, and the engine is as it was.
        """
        check_address(request)
        if request.request_id in self._waiting:
            raise InvalidField(
                f"`request_id` is `{request.request_id}`, which is in use.", field="request_id"
            )
        token_ids = _check_text(request.prompt_token_ids, self.info)
        start = request.second_start
        if type(start) is not int or not 0 <= start <= len(token_ids):
            raise InvalidField(
                f"`second_start` is `{start!r}`; it must be an integer in [0, {len(token_ids)}].",
                field="second_start",
            )
        self._waiting[request.request_id] = _Text(token_ids, start, time.monotonic())
        self.stats.num_waiting = len(self._waiting)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """Forget a text: its last event, or none if it does not wait."""
        text = self._waiting.pop(request_id, None)
        self.stats.num_waiting = len(self._waiting)
        if text is None:
            return []
        usage = Usage(len(text.token_ids), 0, 0, time.monotonic() - text.arrival_s)
        return [TokenEvent(request_id, [], usage, FinishReason.ABORT)]

    def check(self) -> None:
        """Nothing can have happened to it."""

    def step(self) -> list[TokenEvent]:
        """Compute the first of the texts that wait, as many as fit: their events."""
        started_s = time.monotonic()
        first = islice(self._waiting.items(), self.info.max_num_seqs)
        taken = list(first)
        ends = accumulate(len(text.token_ids) for _, text in taken)
        taken = taken[: sum(end <= self._max_tokens for end in ends)]
        vectors = self._vectors([text for _, text in taken])
        events = []
        for (request_id, text), vector in zip(taken, vectors, strict=True):
            del self._waiting[request_id]
            usage = Usage(len(text.token_ids), 0, 0, started_s - text.arrival_s)
            data = vector.astype("<f4", copy=False).tobytes()
            events.append(TokenEvent(request_id, [], usage, FinishReason.STOP, vector=data))
            self.stats.num_prompt_tokens += len(text.token_ids)
        self.stats.num_waiting = len(self._waiting)
        self.stats.num_steps += 1
        self.stats.last_step_s = time.monotonic()
        return events

    def _vectors(self, texts: list[_Text]) -> F32:
        """The answers to some texts, [R, size]; what is not finite is answered as it is."""
        batch = _batch(texts, self.info.block_size, self._model.spec)
        model, kind = self._model, self._pooling.kind
        with np.errstate(all="ignore"):
            model.forward(batch)
            if (rows := rows_of(kind, batch.query_start)) is not None:
                found = model.hidden(rows)
            else:
                hidden = model.hidden(np.arange(len(batch.input_ids)))
                found = pooled(kind, hidden, batch.query_start)
            if model.spec.classifier is not None:
                return activated(self._pooling.activation, model.classify(found))
            return normalised(found) if self._pooling.is_normalised else found


def _resolved(
    config: EngineConfig, spec: ModelSpec, pooling: PoolingSpec, backends: Backends
) -> EngineConfig:
    """The settings with every open one set.

    A text is computed in one step: it can be as long as a step, the model and what the checkpoint
    was made for allow; a longer one that is asked for must fit a step and the model.

    Raises:
        ConfigError: a setting is of no use here, or too large.
    """
    for name, nothing in _UNUSED.items():
        if (value := getattr(config, name)) != nothing:
            raise ConfigError(
                f"`{name}` is `{value}`, which an engine that pools has no use for.",
                hint="leave it out",
            )
    if spec.classifier is not None and config.weight_cache not in {None, "", "off"}:
        raise ConfigError(
            f"`weight_cache` is `{config.weight_cache}`, and a classifier's weights are not kept.",
            hint="leave it out",
        )
    num_tokens = config.max_num_batched_tokens
    if config.max_model_len is not None and config.max_model_len > num_tokens:
        raise ConfigError(
            f"`max_model_len` is `{config.max_model_len}`, and a step has "
            f"`max_num_batched_tokens`, `{num_tokens}`; a text is computed in one step.",
            hint=f"use `--max-num-batched-tokens {config.max_model_len}`",
        )
    longest = min(spec.max_context_len, num_tokens, pooling.max_len or num_tokens)
    num_blocks = -(-num_tokens // config.block_size) + min(config.max_num_seqs, num_tokens)
    config = replace(config, runner="pooling", max_model_len=config.max_model_len or longest)
    return replace(
        config.resolve(
            max_context_len=spec.max_context_len, checkpoint_dtype=spec.dtype, backends=backends
        ),
        num_blocks=num_blocks,  # of a step, however its tokens are cut into texts
    )


def _info(spec: ModelSpec, pooling: PoolingSpec) -> PoolingInfo:
    classifier = spec.classifier
    return PoolingInfo(
        kind=pooling.kind,
        size=spec.hidden_size if classifier is None else classifier.num_labels,
        is_classifier=classifier is not None,
        is_normalised=pooling.is_normalised,
        dimensions=pooling.dimensions,
        prompts=pooling.prompts,
        default_prompt=pooling.default_prompt,
        is_lowercased=pooling.is_lowercased,
        labels=pooling.labels,
    )


def _pooling_line(spec: ModelSpec, pooling: PoolingSpec, config: EngineConfig) -> str:
    """What is made of a text, and how long one may be, for people."""
    what = f"embeddings of {spec.hidden_size:,} numbers"
    if spec.classifier is not None:
        what = f"scores of {spec.classifier.num_labels:,} labels, {pooling.activation}"
    elif pooling.is_normalised:
        what += " of length 1"
    limit = ""
    if config.context_len < spec.max_context_len:
        limit = f" (of {spec.max_context_len:,}: --max-model-len, --max-num-batched-tokens)"
    return (
        f"pooling    {what}, {pooling.kind} ({pooling.source}), texts of up to "
        f"{config.context_len:,} tokens{limit}"
    )


def _check_text(token_ids: Sequence[int], info: EngineInfo) -> list[int]:
    """The text as a list of plain integers."""
    try:
        ids = [index(token_id) for token_id in token_ids]
    except TypeError:
        ids = []
    if not ids:
        raise InvalidField(
            "`prompt_token_ids` must be a list of at least one integer.", field="prompt_token_ids"
        )
    check_ids("prompt_token_ids", ids, info)
    if len(ids) > info.max_model_len:
        raise ContextTooLong(
            f"The text has `{len(ids)}` tokens; at most `{info.max_model_len}` are computed.",
            field="prompt_token_ids",
            hint="shorten it, or start the engine with a larger `--max-model-len`",
        )
    return ids


def _batch(texts: list[_Text], block_size: int, spec: ModelSpec) -> ForwardBatch:
    """A step that computes whole texts, each in blocks of its own, from the first block on."""
    lengths = [len(text.token_ids) for text in texts]
    starts = list(accumulate(lengths, initial=0))
    num_blocks = [-(-length // block_size) for length in lengths]
    first_blocks = np.array(list(accumulate(num_blocks, initial=0))[:-1], np.int32)
    table = first_blocks[:, None] + np.arange(max(num_blocks), dtype=np.int32)
    ids = np.concatenate([np.array(text.token_ids, np.int64) for text in texts])
    positions = np.concatenate([np.arange(length) for length in lengths])
    slots = np.repeat(first_blocks.astype(np.int64) * block_size, lengths) + positions
    if spec.num_token_types > 1:
        for start, text in zip(starts, texts, strict=False):
            if text.second_start:
                second = slice(start + text.second_start, start + len(text.token_ids))
                positions[second] += spec.num_positions  # of the second type
    return ForwardBatch(
        input_ids=ids,
        positions=positions,
        query_start=np.array(starts, np.int32),
        context_len=np.array(lengths, np.int32),
        slot_mapping=slots,
        block_table=np.ascontiguousarray(table),
        block_size=block_size,
        logit_rows=_NO_ROWS,
        lengths=lengths,
        context_lens=lengths,
    )

"""The engine: requests in, tokens out, one `step` at a time. Synchronous; knows token ids only.

Owns the scheduler and the runner, checks what comes in, and counts. Text, stop strings, threads
and processes are in front of it (`penstock.text`, `penstock.engine.client`).
Invariant: a request that `add` refuses leaves no trace, and a step that fails or is interrupted
leaves an engine that goes on with the requests it has.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from operator import index
from typing import Any, Self, final

from penstock.engine.backends import check_stored, passed_over
from penstock.engine.build import make_runner, warm_up
from penstock.engine.config import EngineConfig
from penstock.engine.kv_cache import KVCache
from penstock.engine.locate import locate
from penstock.engine.memory import available_bytes, plan_memory
from penstock.engine.plan import StepPlan
from penstock.engine.policy import POLICIES
from penstock.engine.request import Request
from penstock.engine.runner import Runner, Step
from penstock.engine.scheduler import Scheduler
from penstock.errors import ContextTooLong, InvalidField
from penstock.models.checkpoint import precision
from penstock.models.files import read_config, read_generation_eos
from penstock.models.load import Backends, timed
from penstock.models.spec import ModelSpec
from penstock.sampling.host import check_choice
from penstock.types import (
    MAX_INT,
    MAX_SEED,
    EngineInfo,
    EngineRequest,
    SamplingParams,
    TokenEvent,
)


@final
class EngineCore:
    """One model that serves many requests. Not thread-safe: one thread calls it."""

    def __init__(self, config: EngineConfig, info: EngineInfo, runner: Runner) -> None:
        """Put an engine together from its parts; `from_config` makes them from a checkpoint.

        Args:
            config: the settings, resolved.
            info: what the engine is; its sizes are those of the runner's state and KV store.
            runner: made for this engine alone.
        """
        self.info = info
        self.scheduler = Scheduler(
            KVCache(info.num_blocks, info.block_size, config.enable_prefix_caching),
            POLICIES[config.scheduling_policy](),
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
        )
        self.stats = self.scheduler.stats
        self._runner = runner
        self._in_flight: deque[tuple[StepPlan, Step]] = deque()  # launched, and not read yet
        self._seeds = random.Random(config.seed)
        self._num_arrived = 0

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """Plan the memory, load the model, warm it up.

        Raises:
            ConfigError: a setting is wrong, or there is no such model.
            ModelLoadError: the checkpoint cannot be used.
            NotEnoughMemory: it would not fit. Nothing has been loaded then.
        """
        phases: dict[str, float] = {}
        config = locate(config)
        path = config.path
        with timed(phases, "plan"):  # before a backend is imported: what cannot be is told at once
            model = read_config(path)
            spec = ModelSpec.from_hf(model)
            stored = precision(path, model)
            backends = Backends(spec, config.tensor_parallel_size)
            asked = config.backend
            if stored is not None:
                check_stored(config.quantization, stored.name)
            config = config.resolve(
                max_context_len=spec.max_context_len,
                checkpoint_dtype=spec.dtype,
                backends=backends,
            )
            memory = plan_memory(spec, config, available_bytes(config), stored)
            eos_token_ids = read_generation_eos(path)
        if config.tensor_parallel_size == 1:
            runner = make_runner(path, config, memory.num_blocks, eos_token_ids, None, phases)
        else:
            from penstock.engine.ranks import make_ranked_runner  # one process needs no messages

            runner = make_ranked_runner(path, config, memory.num_blocks, eos_token_ids, phases)
        warm_up(runner, config, phases)
        info = EngineInfo(
            model=config.model,
            max_model_len=config.context_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=eos_token_ids,
            dtype=config.dtype,
            block_size=config.block_size,
            num_blocks=memory.num_blocks,
            max_num_seqs=config.max_num_seqs,
            backend=config.backend,
            quantization=config.quantization if stored is None else stored.name,
            kv_cache_dtype=config.kv_cache_dtype,
            plan=(
                f"backend    {runner.description}{passed_over(asked, config.backend, backends)}",
                *memory.lines,
            ),
            startup_s=phases,
        )
        return cls(config, info, runner)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or bool(self._in_flight)

    def add(self, request: EngineRequest) -> None:
        """Take a request; its tokens come out of the next steps.

        Raises:
            RequestError: it is wrong, and the engine is as it was.
        """
        check_address(request)
        if request.request_id in self.scheduler:
            raise InvalidField(
                f"`request_id` is `{request.request_id}`, which is in use.", field="request_id"
            )
        prompt = _check_prompt(request.prompt_token_ids, self.info)
        params = _check_params(request.params, self.info)
        seed = request.params.seed
        if seed is None:
            seed = self._seeds.randrange(MAX_SEED)
        request = replace(request, prompt_token_ids=prompt, params=params)
        arrival = self._num_arrived
        self.scheduler.add(Request(request, seed=seed, arrival=arrival, arrival_s=time.monotonic()))
        self._num_arrived += 1

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request now and free what it holds: its last event, or none if it is not live."""
        event = self.scheduler.abort(request_id)
        return [] if event is None else [event]

    def check(self) -> None:
        """Raise what has stopped the engine while it had nothing to do, if anything."""
        self._runner.check()

    def step(self) -> list[TokenEvent]:
        """Launch one batch and read the one before: the events of all requests that got a token.

        How far reading stays behind is the runner's `depth`; with 0 it reads what it launched.
        Whatever this raises, KeyboardInterrupt included, all requests wait again and the next step
        may be made. If it was cut off behind the model, some of its events may be lost.
        """
        events: list[TokenEvent] = []
        try:
            plan = self.scheduler.schedule()
            if plan.slices:
                self._in_flight.append((plan, self._runner.launch(plan)))
            num_kept = self._runner.depth if plan.slices else 0
            while len(self._in_flight) > num_kept:
                plan, step = self._in_flight.popleft()
                events += self.scheduler.commit(plan, step.read())
        except BaseException:  # the prefix cache holds what may never have been computed
            self._in_flight.clear()
            self.scheduler.restart()
            raise
        self.stats.last_step_s = time.monotonic()
        return events


def check_address(request: EngineRequest) -> None:
    """Who asks, and where that is put in the queue and in the prefix cache."""
    for name, kind in (("request_id", str), ("salt", str), ("priority", int)):
        value = getattr(request, name)
        if type(value) is not kind or (kind is int and abs(int(value)) > MAX_INT):
            wanted = "a string" if kind is str else f"an integer in [{-MAX_INT}, {MAX_INT}]"
            raise InvalidField(f"`{name}` is `{value!r}`; it must be {wanted}.", field=name)


def _check_prompt(token_ids: Sequence[int], info: EngineInfo) -> list[int]:
    """The prompt as a list of plain integers."""
    try:
        prompt = [index(token_id) for token_id in token_ids]
    except TypeError:
        prompt = []
    if not prompt:
        raise InvalidField(
            "`prompt_token_ids` must be a list of at least one integer.", field="prompt_token_ids"
        )
    check_ids("prompt_token_ids", prompt, info)
    if len(prompt) >= info.max_model_len:
        raise ContextTooLong(
            f"The prompt has `{len(prompt)}` tokens; with one token of answer it must fit into the "
            f"context of `{info.max_model_len}`.",
            field="prompt_token_ids",
            hint="shorten the prompt, or start the engine with a larger `--max-model-len`",
        )
    return prompt


def _check_params(params: SamplingParams, info: EngineInfo) -> SamplingParams:
    """The parameters without repeated ids, if they suit the model. `SamplingParams` checks ranges.

    Every id is in the vocabulary, so that no list of ids is longer than that.
    """
    if params.n != 1:
        raise InvalidField(f"`n` is `{params.n}`; the engine takes one at a time.", field="n")
    for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        check_ids(name, list(getattr(params, name) or ()), info)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > info.vocab_size:
            raise InvalidField(
                f"`{name}` is `{getattr(params, name)}`, more than the `{info.vocab_size}` tokens "
                "of the vocabulary.",
                field=name,
            )
    check_choice(params, info.eos_token_ids, info.vocab_size)
    distinct: dict[str, Any] = {
        name: tuple(dict.fromkeys(getattr(params, name)))
        for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids")
        if getattr(params, name)
    }
    return replace(params, **distinct) if distinct else params


def check_ids(name: str, token_ids: Sequence[int], info: EngineInfo) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidField(
                f"`{name}` holds `{token_id}`, which is not in the vocabulary of "
                f"`{info.vocab_size}` tokens.",
                field=name,
            )

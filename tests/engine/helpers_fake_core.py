"""An engine without a model: its tokens can be told in advance, and it fails when asked to.

`EngineConfig(model=...)` chooses how loading goes, the first token of a prompt how a step goes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from penstock.engine.config import EngineConfig
from penstock.errors import (
    ConfigError,
    InvalidField,
    ModelLoadError,
    NotEnoughMemory,
    UnsupportedModel,
)
from penstock.types import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    TokenEvent,
    TokenLogprobs,
    Usage,
)

EXPLODE = 900  # the step that computes it raises
EXIT = 901  # ... ends the process
VOCAB = 1000


def tokens_of(prompt: list[int], num_tokens: int) -> list[int]:
    """What the engine answers to a prompt."""
    return [(sum(prompt) * 31 + i * 7) % VOCAB for i in range(num_tokens)]


class FakeCore:
    """One token a step for every live request. `max_tokens` None never ends."""

    def __init__(self, config: EngineConfig, on_step: Callable[[], None] | None = None) -> None:
        self.live: dict[str, EngineRequest] = {}
        self.num_done: dict[str, int] = {}
        self.stepped: list[list[str]] = []  # the live requests of each step
        self.stats = EngineStats()
        self.on_step = on_step
        self.on_check: Callable[[], None] | None = None
        self.info = EngineInfo(
            model=config.model,
            max_model_len=1 << 20,
            vocab_size=VOCAB,
            eos_token_ids=(2,),
            dtype="float32",
            block_size=config.block_size,
            num_blocks=100,
            max_num_seqs=config.max_num_seqs,
            plan=("weights: none",),
            startup_s={"load": 0.5},
        )

    def check(self) -> None:
        if self.on_check is not None:
            self.on_check()

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: EngineRequest) -> None:
        if not request.prompt_token_ids:
            raise InvalidField("`prompt` is empty.", field="prompt_token_ids", hint="say something")
        assert request.request_id not in self.live
        self.live[request.request_id] = request
        self.num_done[request.request_id] = 0
        self._count()

    def abort(self, request_id: str) -> list[TokenEvent]:
        if request_id not in self.live:
            return []
        request = self.live.pop(request_id)
        self._count()
        return [TokenEvent(request_id, [], self._usage(request), FinishReason.ABORT)]

    def step(self) -> list[TokenEvent]:
        time.sleep(0.001)
        self.stepped.append(list(self.live))
        if self.on_step is not None:
            self.on_step()
        events = [self._event(request) for request in list(self.live.values())]
        self.stats.num_steps += 1
        self._count()
        return events

    def _event(self, request: EngineRequest) -> TokenEvent:
        prompt, request_id = request.prompt_token_ids, request.request_id
        if prompt[0] == EXPLODE:
            raise RuntimeError("boom")
        if prompt[0] == EXIT:
            sys.stderr.write("about to exit\n")
            sys.stderr.flush()
            os._exit(7)
        done = self.num_done[request_id]
        token_id = tokens_of(prompt, done + 1)[-1]
        self.num_done[request_id] = done + 1
        finish = None
        if request.params.max_tokens == done + 1:
            finish = FinishReason.LENGTH
            del self.live[request_id]
        wants_logprobs = request.params.logprobs is not None
        logprobs = (
            [TokenLogprobs(token_id, -0.5, 1, ((token_id, -0.5),))] if wants_logprobs else None
        )
        wants_prompt = request.params.prompt_logprobs is not None and done == 0
        return TokenEvent(
            request_id,
            [token_id],
            self._usage(request),
            finish,
            logprobs=logprobs,
            prompt_logprobs=[None, TokenLogprobs(prompt[0], -1.0, 2)] if wants_prompt else None,
        )

    def _usage(self, request: EngineRequest) -> Usage:
        return Usage(len(request.prompt_token_ids), 0, self.num_done[request.request_id], 0.25)

    def _count(self) -> None:
        self.stats.num_running = len(self.live)


def make(config: EngineConfig) -> FakeCore:
    """What a client calls to load; in the child of a ProcessClient, too."""
    match config.model:
        case "bad-config":
            raise ConfigError("`block_size` is `0`.", hint="use 16")
        case "no-model":
            raise ModelLoadError("`x` is no checkpoint.")
        case "unsupported":
            raise UnsupportedModel("`FooForCausalLM` is not known.", hint="known: `Llama`")
        case "no-memory":
            raise NotEnoughMemory("`9` GiB are missing.", hint="lower `max_model_len`")
        case "raises":
            raise RuntimeError("loading broke")
        case "exits":
            sys.stderr.write("out of luck\n")
            sys.stderr.flush()
            os._exit(3)
        case "hangs":
            time.sleep(3600)
    return FakeCore(config)

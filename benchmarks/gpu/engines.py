"""penstock's engine as the benchmarks drive it: requests of random tokens, in process, no server.

Owns how an engine is made for a measurement and what a window of steady decoding is. Knows no
benchmark. Prompts are random, so that no two share a prefix unless they are made to.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import shapes
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.engine.memory import MemoryPlan, available_bytes, plan_memory
from penstock.models.files import read_config
from penstock.models.load import Backends
from penstock.models.spec import ModelSpec
from penstock.types import EngineRequest, SamplingParams

Prompt = list[int]
_ids = count()


class Settled(NamedTuple):
    """Some windows of steady decoding."""

    step_s: list[float]  # seconds a step, of each window
    context: float  # tokens in the KV cache of a request, on average over all windows
    num_steps: int


def config_of(directory: Path, **settings: Any) -> EngineConfig:
    """The Triton backend with weights drawn on the device, unless `settings` say otherwise."""
    given: dict[str, Any] = {
        "model": str(directory),
        "backend": "triton",
        "dtype": "bfloat16",
        "load_format": "dummy",
        "enable_prefix_caching": False,
    }
    return EngineConfig(**(given | settings))


def plan_of(config: EngineConfig) -> MemoryPlan:
    """The memory plan that an engine of this config would make now."""
    spec = ModelSpec.from_hf(read_config(config.model))
    resolved = config.resolve(
        max_context_len=spec.max_context_len,
        checkpoint_dtype=spec.dtype,
        backends=Backends(spec, config.tensor_parallel_size),
    )
    return plan_memory(spec, resolved, available_bytes(resolved))


@contextmanager
def engine(shape: str, **settings: Any) -> Iterator[EngineCore]:
    """An engine of `config_of`, for a shape."""
    with shapes.directory(shape) as path:
        core = EngineCore.from_config(config_of(path, **settings))
    yield core


def prompts(rng: random.Random, num: int, length: int, vocab_size: int) -> list[Prompt]:
    """Random prompts of one length."""
    return [rng.choices(range(vocab_size), k=length) for _ in range(num)]


def submit(
    core: EngineCore, work: Sequence[tuple[Prompt, int]], temperature: float = 0.0
) -> list[str]:
    """Add requests, each with the tokens of its answer: their ids."""
    request_ids = []
    for prompt, num_output in work:
        params = SamplingParams(temperature=temperature, max_tokens=num_output, ignore_eos=True)
        request_ids.append(f"r{next(_ids)}")
        request = EngineRequest(request_id=request_ids[-1], prompt_token_ids=prompt, params=params)
        core.add(request)
    return request_ids


def drain(core: EngineCore) -> int:
    """Step until nothing is left: the number of tokens that came."""
    num_tokens = 0
    while core.has_work:
        num_tokens += sum(len(event.token_ids) for event in core.step())
    return num_tokens


def timed(core: EngineCore, work: Sequence[tuple[Prompt, int]], temperature: float = 0.0) -> float:
    """Seconds from the submission of all until the last token of the last.

    Raises:
        RuntimeError: other than the tokens that were asked for came.
    """
    started_s = time.perf_counter()
    submit(core, work, temperature)
    num_tokens = drain(core)
    seconds = time.perf_counter() - started_s
    wanted = sum(num_output for _, num_output in work)
    if num_tokens != wanted:
        raise RuntimeError(f"{num_tokens} tokens came, {wanted} were asked for")
    return seconds


def decode(
    core: EngineCore,
    work: Sequence[Prompt],
    *,
    num_windows: int,
    window: int,
    temperature: float = 0.0,
) -> Settled:
    """Let all of `work` decode at once and time windows of `window` steps; then end them.

    Raises:
        RuntimeError: not every step of a window gave every request a token.
    """
    num_warm = window
    with decoding(core, work, num_windows * window + num_warm, temperature) as begun:
        for _ in range(num_warm):
            core.step()
        step_s = []
        for _ in range(num_windows):
            started_s, num_tokens = time.perf_counter(), 0
            for _ in range(window):
                num_tokens += sum(len(event.token_ids) for event in core.step())
            step_s.append((time.perf_counter() - started_s) / window)
            if num_tokens != window * len(work):
                raise RuntimeError(f"{num_tokens} tokens in {window} steps of {len(work)} requests")
        context = begun + num_warm + num_windows * window / 2
    return Settled(step_s, context, num_windows * window)


@contextmanager
def decoding(
    core: EngineCore, work: Sequence[Prompt], num_steps: int, temperature: float = 0.0
) -> Iterator[float]:
    """Requests that all have their first token and decode for `num_steps` steps and more.

    Yields:
        their mean number of tokens; they are ended behind the block.
    """
    slack = 4 + 4 * len(work)  # steps in which others of them still prefill
    request_ids = submit(core, [(prompt, num_steps + slack) for prompt in work], temperature)
    waiting = set(request_ids)
    num_tokens = sum(map(len, work))
    try:
        while waiting:
            for event in core.step():
                waiting.discard(event.request_id)
                num_tokens += len(event.token_ids)
                if event.finish is not None:
                    raise RuntimeError("a request ended before all had begun")
        yield num_tokens / len(work)
    finally:
        for request_id in request_ids:
            core.abort(request_id)
        drain(core)

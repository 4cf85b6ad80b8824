"""From settings and a checkpoint to a runner that has run once.

Owns which runner a backend has. What it is told is resolved and planned: it decides nothing.
Imports torch only for the backend that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from penstock.engine.config import EngineConfig
from penstock.engine.memory import PROMPT_LOGPROB_ROWS, check_rank
from penstock.engine.plan import Admission, Slice, StepPlan
from penstock.engine.runner import HostRunner, Runner
from penstock.engine.state import DeviceState
from penstock.models.files import read_config
from penstock.models.load import load_model, timed
from penstock.models.spec import ModelSpec
from penstock.types import SamplingParams

if TYPE_CHECKING:  # it is made of torch
    from penstock.parallel.group import Group

_PROMPT_SIZE = 8  # tokens of a warm-up without a GPU
_SHORT_SIZE = 2  # and on a GPU of a prompt beside the longest: attention has other tiles for it


def make_runner(
    path: Path,
    config: EngineConfig,
    num_blocks: int,
    eos_token_ids: tuple[int, ...],
    group: Group | None,
    phases: dict[str, float],
) -> Runner:
    """Load the model with its KV store.

    Args:
        path: directory of the model.
        config: resolved.
        num_blocks: of the KV store, from the memory plan.
        eos_token_ids: end-of-sequence tokens.
        group: the ranks that each call this, with their own; None: it computes alone.
        phases: takes the seconds of what is done.

    Raises:
        ModelLoadError: the checkpoint cannot be used.
        ConfigError: something is not installed that the backend needs.
        NotEnoughMemory: this rank's GPU has less free than the first one's.
    """
    if config.backend == "triton":
        return _on_device(path, config, num_blocks, eos_token_ids, group, phases)
    model = load_model(
        path,
        backend=config.backend,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        num_slots=num_blocks * config.block_size,
        max_num_tokens=config.max_num_batched_tokens,
        max_num_logit_rows=max(config.max_num_seqs, PROMPT_LOGPROB_ROWS),
        num_threads=config.num_threads,
        load_format=config.load_format,
        weight_cache=config.weight_cache,
        phases=phases,
    )
    return HostRunner(model, _state(config), eos_token_ids)


def warm_up(runner: Runner, config: EngineConfig, phases: dict[str, float]) -> None:
    """Run a prompt and a decode step in row 0 and the first blocks; leave the row free.

    On a GPU the longest prompt, with which the largest step has taken its memory, and a short one,
    which attention has other tiles for. Weights, sampler and graphs compiled theirs when made.
    """
    is_on_gpu = config.gpu_memory_utilization is not None
    most = min(config.max_num_batched_tokens, config.context_len - 1)
    num_tokens = most if is_on_gpu else min(_PROMPT_SIZE, most)
    block_ids = list(range(-(-(num_tokens + 1) // config.block_size)))
    admission = Admission(0, [0] * num_tokens, num_tokens, SamplingParams(temperature=0.0), 0)
    plans = [StepPlan([Slice(0, 0, num_tokens)], [admission], [], [(0, block_ids)])]
    if is_on_gpu and most > _SHORT_SIZE:  # a piece of the prompt
        plans.append(StepPlan([Slice(0, 0, _SHORT_SIZE)], [], [], []))
    if num_tokens + 2 <= config.context_len:
        plans.append(StepPlan([Slice(0, num_tokens, 1)], [], [], []))
    with timed(phases, "warmup"):
        for plan in [*plans, StepPlan([], [], [0], [])]:
            runner.launch(plan).read()


def _on_device(
    path: Path,
    config: EngineConfig,
    num_blocks: int,
    eos_token_ids: tuple[int, ...],
    group: Group | None,
    phases: dict[str, float],
) -> Runner:
    """The share of one rank."""
    with timed(phases, "import"):
        from penstock.engine.device_runner import DeviceRunner
        from penstock.kernels.gpu import device
        from penstock.models import device_model
        from penstock.parallel.group import Alone
    group = group or Alone()
    check_rank(ModelSpec.from_hf(read_config(path)), config, num_blocks, group.rank)
    model = device_model.load(
        path,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        num_blocks=num_blocks,
        block_size=config.block_size,
        group=group,
        device=device(group.rank),
        attention_backend=config.attention_backend,
        load_format=config.load_format,
        seed=0,
        phases=phases,
    )
    with timed(phases, "graphs"):
        return DeviceRunner(
            model,
            _state(config),
            eos_token_ids,
            depth=int(bool(config.async_scheduling)),
            enforce_eager=config.enforce_eager,
        )


def _state(config: EngineConfig) -> DeviceState:
    return DeviceState(config.max_num_seqs, config.context_len, config.block_size)

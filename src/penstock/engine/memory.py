"""What a model will need in memory, as arithmetic, before anything is loaded.

Owns the size of the KV pool: it is what free memory allows, or what the user asked for. Knows the
model by its `ModelSpec` alone: no weight is touched, so that a plan takes no time.
Invariant: a plan that is returned has room for at least one request of `max_model_len` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.config import EngineConfig
from penstock.engine.state import DeviceState
from penstock.errors import NotEnoughMemory
from penstock.models.footprint import Footprint, Step, on_native, on_torch
from penstock.models.spec import ModelSpec
from penstock.quantization.schemes import NONE

KV_SHARE = 0.5  # of the memory left, if the KV pool may choose its size
PROMPT_LOGPROB_ROWS = 256  # prompt positions whose logits are held at the same time
LOGIT_BYTES = 28  # a logit: itself, its softmax, sorted, running sums; measured with top-k


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes."""

    weight_bytes: int
    workspace_bytes: int  # activations, logits and device state at the largest step
    kv_bytes: int  # num_blocks * block_bytes
    total_bytes: int  # these three, and what the program itself takes
    block_bytes: int  # of one KV block over all layers
    num_blocks: int
    available_bytes: int
    lines: tuple[str, ...]  # the arithmetic, for people


def plan_memory(spec: ModelSpec, config: EngineConfig, available_bytes: int) -> MemoryPlan:
    """Divide `available_bytes` between weights, workspace and KV pool.

    Args:
        config: a resolved config.

    Raises:
        NotEnoughMemory: it does not fit; the hint names a setting with which it does.
    """
    block_bytes = config.block_size * spec.kv_bytes_per_token(config.kv_cache_dtype)
    model = _footprint(spec, config)
    workspace_bytes = model.workspace_bytes + _engine_bytes(spec, config)
    fixed_bytes = model.runtime_bytes + model.weight_bytes + workspace_bytes
    left_bytes = available_bytes - fixed_bytes
    num_blocks = _num_blocks(config, block_bytes, left_bytes)
    kv_bytes = num_blocks * block_bytes
    total_bytes = fixed_bytes + kv_bytes
    lines = (
        f"weights    {_size(model.weight_bytes)} = {model.weights}",
        f"workspace  {_size(workspace_bytes)} for {config.max_num_batched_tokens:,} tokens a step, "
        f"{config.max_num_seqs} requests of {config.context_len:,} tokens",
        f"runtime    {_size(model.runtime_bytes)} for {model.runtime}",
        f"KV cache   {_size(kv_bytes)} = {num_blocks:,} blocks x {config.block_size} tokens "
        f"x {block_bytes // config.block_size:,} bytes ({config.kv_cache_dtype})",
        f"total      {_size(total_bytes)} of {_size(available_bytes)} available",
    )
    sizes = (model.weight_bytes, workspace_bytes, kv_bytes, total_bytes, block_bytes)
    plan = MemoryPlan(*sizes, num_blocks, available_bytes, lines)
    if total_bytes > available_bytes:
        raise NotEnoughMemory(
            "The memory plan does not fit:\n" + "\n".join(lines),
            hint=_what_fits(config, plan, left_bytes),
        )
    return plan


def _footprint(spec: ModelSpec, config: EngineConfig) -> Footprint:
    """What the backend takes for the model."""
    step = Step(config.max_num_batched_tokens, config.context_len)
    if config.backend == "torch":
        return on_torch(spec, config.dtype, step)
    return on_native(spec, config.dtype, config.quantization, step, config.num_threads)


def _engine_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Logits and the state of requests, at the largest step."""
    logits = max(config.max_num_seqs, PROMPT_LOGPROB_ROWS) * spec.vocab_size * LOGIT_BYTES
    state = DeviceState.bytes_for(config.max_num_seqs, config.context_len, config.block_size)
    return logits + state


def _num_blocks(config: EngineConfig, block_bytes: int, left_bytes: int) -> int:
    """The size of the pool: as asked for, else up to every request at full length."""
    needed = -(-config.context_len // config.block_size)  # of one request
    if config.num_blocks is None and config.kv_cache_memory_bytes is None:
        share = int(left_bytes * KV_SHARE) // block_bytes
        return min(config.max_num_seqs * needed, max(needed, share))
    if config.num_blocks is not None:
        num_blocks, enough = config.num_blocks, f"--num-blocks {needed}"
    else:
        num_blocks = (config.kv_cache_memory_bytes or 0) // block_bytes
        enough = f"--kv-cache-memory-bytes {needed * block_bytes}"
    if (fits := num_blocks * config.block_size) < config.context_len:
        raise NotEnoughMemory(
            f"The KV cache of `{num_blocks}` blocks of `{config.block_size}` tokens is too small "
            f"for one request of `{config.context_len}` tokens.",
            hint=f"use `{enough}` or more"
            + (f", or `--max-model-len` of at most {fits}" if fits else ""),
        )
    return num_blocks


def _what_fits(config: EngineConfig, plan: MemoryPlan, left_bytes: int) -> str:
    """The setting to change so that the plan fits."""
    if left_bytes + plan.workspace_bytes <= 0:
        if config.dtype == "float32":
            return "use `--dtype bfloat16` for half the weights, or a smaller model"
        if config.backend == "native" and config.quantization == NONE:
            return "use `--quantization int8` or `int4`, or a smaller model"
        return "use a smaller model: its weights alone do not fit"
    num_blocks = left_bytes // plan.block_bytes
    num_tokens = num_blocks * config.block_size
    if num_tokens < 2:
        return "lower `--max-num-batched-tokens`, `--max-num-seqs` or `--max-model-len`"
    is_pool_given = config.num_blocks is not None or config.kv_cache_memory_bytes is not None
    if num_tokens < config.context_len:
        open_pool = " and leave the size of the KV cache open" if is_pool_given else ""
        return f"use `--max-model-len {num_tokens}` or less{open_pool}"
    if config.num_blocks is not None:
        return f"use `--num-blocks {num_blocks}` or less"
    return f"use `--kv-cache-memory-bytes {num_blocks * plan.block_bytes}` or less"


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:8.2f} GiB"
    return f"{num_bytes / 2**20:8.2f} MiB"

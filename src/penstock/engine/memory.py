"""What a model will need in memory, as arithmetic, before anything is loaded.

Owns the size of the KV pool: it is what free memory allows, or what the user asked for. Knows the
model by its `ModelSpec` alone: no weight is touched, so that a plan takes no time. With several
ranks it is the plan of each of them.
Invariant: a plan that is returned has room for at least one request of `max_model_len` tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from penstock.engine.config import EngineConfig
from penstock.engine.state import DeviceState
from penstock.errors import NotEnoughMemory
from penstock.hardware import available_memory_bytes
from penstock.models.device_footprint import (
    GROUP_BYTES,
    DeviceStep,
    flashinfer_bytes,
    graph_sizes,
    on_device,
    share_of,
    table_bytes,
)
from penstock.models.footprint import Footprint, Step, on_native, on_torch
from penstock.models.spec import ITEM_BYTES, ModelSpec
from penstock.quantization.schemes import NONE
from penstock.quantization.stored import StoredPrecision

KV_SHARE = 0.5  # of the memory left, if the KV pool may choose its size
GPU_KV_SHARE = 1.0  # there `--gpu-memory-utilization` has left the rest
PROMPT_LOGPROB_ROWS = 256  # prompt positions whose logits are held at the same time
POOLED_COPIES = 4  # of a step's hidden states, in float32
SHAPED_LOGITS = 2**20  # that are shaped or sorted at once on a device: `sampling.device.PIECE`
SHAPED_BYTES = 96  # each of them: 72 in tensors, measured with typical-p, and room to sort
MASK_BYTES = 2  # a logit there, for what a request excludes
_UNITS = {20: "MiB", 30: "GiB", 40: "TiB"}
LOGIT_BYTES = 28  # a logit: itself, its softmax, sorted, running sums; measured with top-k


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes."""

    weight_bytes: int
    workspace_bytes: int  # activations, logits and device state at the largest step
    runtime_bytes: int  # what program and libraries take; on a GPU with the graphs
    kv_bytes: int  # num_blocks * block_bytes
    total_bytes: int  # of these; on a GPU with one block more, for padding
    block_bytes: int  # of one KV block over all layers
    num_blocks: int
    available_bytes: int
    lines: tuple[str, ...]  # the arithmetic, for people


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    available_bytes: int,
    stored: StoredPrecision | None = None,
) -> MemoryPlan:
    """Divide `available_bytes` between weights, workspace and KV pool.

    Args:
        config: a resolved config.
        stored: the codes in which the checkpoint has its matrices.

    Raises:
        NotEnoughMemory: it does not fit; the hint names a setting with which it does.
    """
    is_shared = config.tensor_parallel_size > 1
    holder = share_of(spec, config.tensor_parallel_size) if is_shared else spec
    block_bytes = config.block_size * holder.kv_bytes_per_token(config.kv_cache_dtype)
    model = _footprint(spec, config, stored)
    workspace_bytes = model.workspace_bytes + _engine_bytes(spec, config)
    fixed_bytes = model.runtime_bytes + model.weight_bytes + workspace_bytes
    num_dummies = _num_dummies(config)
    fixed_bytes += num_dummies * block_bytes
    left_bytes = available_bytes - fixed_bytes
    num_blocks = _num_blocks(config, block_bytes, left_bytes)
    kv_bytes = num_blocks * block_bytes
    total_bytes = fixed_bytes + kv_bytes
    num_ranks = config.tensor_parallel_size
    lines = (
        *([f"ranks      {num_ranks}, each of which takes:"] if num_ranks > 1 else []),
        f"weights    {_size(model.weight_bytes)} = {model.weights}",
        f"workspace  {_size(workspace_bytes)} for {config.max_num_batched_tokens:,} tokens a step, "
        f"{config.max_num_seqs} requests of {config.context_len:,} tokens",
        f"runtime    {_size(model.runtime_bytes)} for {model.runtime}",
        f"KV cache   {_size(kv_bytes + num_dummies * block_bytes)} = {num_blocks:,}"
        f"{' + 1' * num_dummies} blocks x {config.block_size} tokens "
        f"x {block_bytes // config.block_size:,} bytes ({config.kv_cache_dtype})",
        f"total      {_size(total_bytes)} of {_size(available_bytes)} available{_where(config)}",
    )
    plan = MemoryPlan(
        weight_bytes=model.weight_bytes,
        workspace_bytes=workspace_bytes,
        runtime_bytes=model.runtime_bytes,
        kv_bytes=kv_bytes,
        total_bytes=total_bytes,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        available_bytes=available_bytes,
        lines=lines,
    )
    if total_bytes > available_bytes:
        raise NotEnoughMemory(
            "The memory plan does not fit:\n" + "\n".join(lines),
            hint=_what_fits(config, plan, left_bytes),
        )
    return plan


def available_bytes(config: EngineConfig, rank: int = 0) -> int:
    """What each rank's plan may divide: on a GPU the share of its free memory that `config` says.

    Asked for a GPU, this makes a CUDA context there, whose memory is taken off already. Ranks on
    the CPU share what is free.
    """
    if config.gpu_memory_utilization is None:
        return available_memory_bytes() // config.tensor_parallel_size
    from penstock.kernels import gpu

    free_bytes, _ = gpu.memory_bytes(gpu.device(rank))
    return int(free_bytes * config.gpu_memory_utilization)


def check_rank(spec: ModelSpec, config: EngineConfig, num_blocks: int, rank: int) -> None:
    """Whether a rank's own GPU has room for what the first one has planned with its GPU.

    Asked when the group is there and nothing else. The share that `--gpu-memory-utilization` leaves
    is for what no plan knows, and so for the little by which GPUs that are alike differ.

    Raises:
        NotEnoughMemory: it has not; the sentence has the arithmetic for this rank.
    """
    if rank == 0 or config.gpu_memory_utilization is None:
        return
    free_bytes = available_bytes(replace(config, gpu_memory_utilization=1.0), rank)
    planned = replace(config, num_blocks=num_blocks, kv_cache_memory_bytes=None)
    plan = plan_memory(spec, planned, sys.maxsize)
    missing_bytes = plan.total_bytes - GROUP_BYTES - free_bytes
    if missing_bytes > 0:
        fits = num_blocks - -(-missing_bytes // plan.block_bytes)
        is_enough = fits * config.block_size >= config.context_len
        lines = (
            f"The GPU of rank `{rank}` has no room for the plan, made for that of rank `0`:",
            *plan.lines[:-1],
            f"total      {_size(plan.total_bytes)}: the group has {_size(GROUP_BYTES)} of it now",
            f"free       {_size(free_bytes)}: {_size(missing_bytes).strip()} too little",
        )
        raise NotEnoughMemory(
            "\n".join(lines),
            hint=f"free memory on the GPU of rank `{rank}`"
            + (f", or use `--num-blocks {fits}` or less" if is_enough else ""),
        )


def _footprint(spec: ModelSpec, config: EngineConfig, stored: StoredPrecision | None) -> Footprint:
    """What the backend takes for the model."""
    if config.backend == "triton":
        graphs = [] if config.enforce_eager else graph_sizes(config.max_num_seqs)
        num_rows = max(graphs, default=0)
        largest = DeviceStep(config.max_num_batched_tokens, num_rows, len(graphs))
        return on_device(
            spec,
            config.dtype,
            config.quantization,
            largest,
            config.tensor_parallel_size,
            is_on_gpu=config.gpu_memory_utilization is not None,
            stored=stored,
        )
    step = Step(config.max_num_batched_tokens, config.context_len)
    if config.backend == "torch":
        return on_torch(spec, config.dtype, step, stored)
    return on_native(spec, config.dtype, config.quantization, step, config.num_threads, stored)


def _engine_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Logits and the state of requests, at the largest step."""
    if config.runner == "pooling":  # hidden states, and what is made of them
        return 4 * POOLED_COPIES * config.max_num_batched_tokens * spec.hidden_size
    sizes = config.max_num_seqs, config.context_len, config.block_size
    if config.backend == "triton":
        attention = 0  # "auto" takes our own kernels wherever FlashInfer could compute as well
        if config.attention_backend == "flashinfer":
            attention = flashinfer_bytes(config.max_num_seqs, is_eager=config.enforce_eager)
        return _device_logit_bytes(spec, config) + table_bytes(*sizes) + attention
    logits = max(config.max_num_seqs, PROMPT_LOGPROB_ROWS) * spec.vocab_size * LOGIT_BYTES
    return logits + DeviceState.bytes_for(*sizes)


def _device_logit_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Logits on a device: of an eager step, of graphs, and what shaping them takes."""
    item_bytes, ranks = ITEM_BYTES[config.dtype], config.tensor_parallel_size
    share = share_of(spec, ranks).vocab_size  # its own, then those of all ranks
    computed = item_bytes * (share * (1 + ranks) if ranks > 1 else share)
    rows = max(config.max_num_seqs, PROMPT_LOGPROB_ROWS)
    eager = rows * (computed + item_bytes * spec.hidden_size)
    num_replayed = 0 if config.enforce_eager else graph_sizes(config.max_num_seqs)[-1]
    replayed = num_replayed * (computed + item_bytes * spec.vocab_size)
    shaped = max(SHAPED_LOGITS, spec.vocab_size) * SHAPED_BYTES
    masks = config.max_num_seqs * spec.vocab_size * MASK_BYTES
    return eager + replayed + shaped + masks


def _num_dummies(config: EngineConfig) -> int:
    """Blocks that padding is written to, beside those of requests."""
    return 1 if config.backend == "triton" else 0


def _num_blocks(config: EngineConfig, block_bytes: int, left_bytes: int) -> int:
    """The size of the pool: as asked for, else up to every request at full length.

    Bytes that are given hold the blocks for padding as well; those are off `left_bytes` already.
    """
    needed = -(-config.context_len // config.block_size)  # of one request
    if config.num_blocks is None and config.kv_cache_memory_bytes is None:
        is_on_gpu = config.gpu_memory_utilization is not None
        share = int(left_bytes * (GPU_KV_SHARE if is_on_gpu else KV_SHARE)) // block_bytes
        return min(config.max_num_seqs * needed, max(needed, share))
    if config.num_blocks is not None:
        num_blocks, enough = config.num_blocks, f"--num-blocks {needed}"
    else:
        num_dummies = _num_dummies(config)
        num_blocks = max((config.kv_cache_memory_bytes or 0) // block_bytes - num_dummies, 0)
        enough = f"--kv-cache-memory-bytes {(needed + num_dummies) * block_bytes}"
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
        if config.quantization == NONE and config.backend != "torch":
            suffix = "-a16" if config.backend == "triton" else ""
            return f"use `--quantization int8{suffix}` or `int4{suffix}`, or a smaller model"
        if config.backend == "triton" and config.gpu_memory_utilization is not None:
            return "use more GPUs (`--tensor-parallel-size`), or a smaller model"
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
    pool_bytes = (num_blocks + _num_dummies(config)) * plan.block_bytes
    return f"use `--kv-cache-memory-bytes {pool_bytes}` or less"


def _where(config: EngineConfig) -> str:
    """What of a GPU is available."""
    if config.gpu_memory_utilization is None:
        return ""
    each = "each" if config.tensor_parallel_size > 1 else "the"
    return f": {config.gpu_memory_utilization:g} of what is free on {each} GPU"


def _size(num_bytes: int) -> str:
    """In 12 places, however much it is."""
    power = min(max((num_bytes.bit_length() - 1) // 10 * 10, 20), 40)
    number = num_bytes / 2**power
    form = "8.2f" if number < 10**5 else "8.2e"
    return f"{number:{form}} {_UNITS[power]}"

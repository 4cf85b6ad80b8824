"""The settings of one engine, and the only place where "auto" becomes a value.

Owns names, defaults, help and range checks; `penstock.cli` makes its options from the fields. What
each backend has is in `engine.backends`.
Knows neither files nor torch nor memory; what checkpoint and machine say, it is told.
Invariant: a config that `resolve` has returned is open only in sizes, which the memory plan gives,
and in `attention_backend`, which may be "auto" until there is a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from penstock.engine.backends import ATTENTION_BACKENDS, NAMES, Backends, check, choose
from penstock.engine.policy import POLICIES
from penstock.errors import ConfigError
from penstock.quantization.schemes import NAMES as QUANTIZATIONS
from penstock.quantization.schemes import NONE

RUNNERS = ("auto", "generate", "pooling")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", *NAMES)
KV_CACHE_DTYPES = (*DTYPES, "int8", "fp8")
LOAD_FORMATS = ("auto", "dummy")
GPU_MEMORY_UTILIZATION = 0.9  # the rest is for what no plan can know
MAX_INT = 2**63 - 1  # what messages and arithmetic can take; far beyond any use


def _option(default: Any, flag: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"flag": flag, "help": help, "choices": choices})


def _number(default: int | None, flag: str, help: str, low: int = 1, high: int = MAX_INT) -> Any:
    limits = {"flag": flag, "help": help, "choices": None, "low": low, "high": high}
    return field(default=default, metadata=limits)


def _share(flag: str, help: str) -> Any:
    """A part of something, in (0, 1]; None is left open."""
    return field(
        default=None, metadata={"flag": flag, "help": help, "choices": None, "share": True}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run one model. Flags carry vLLM's names where vLLM has the same thing.

    Raises:
        ConfigError: a value is out of range, or two values cannot be combined.
    """

    model: str = _option(
        MISSING, "--model", "directory, GGUF file, built-in name, or org/name of a hub"
    )
    revision: str | None = _option(
        None, "--revision", "branch, tag or commit of a model of a hub; default: main"
    )
    model_path: str | None = field(  # set by `engine.locate`, once
        default=None, metadata={"hidden": True, "choices": None}
    )
    runner: str = _option(
        "auto",
        "--runner",
        "generate: write; pooling: embed or score; auto: what the checkpoint is for",
        RUNNERS,
    )
    dtype: str = _option(
        "auto", "--dtype", "what is computed in; auto: what the checkpoint has", DTYPES
    )
    backend: str = _option(
        "auto", "--backend", "who computes; auto: the first of these that can", BACKENDS
    )
    quantization: str = _option(
        NONE, "--quantization", "format of the weights; a16: 16-bit activations", QUANTIZATIONS
    )
    kv_cache_dtype: str = _option(
        "auto", "--kv-cache-dtype", "type of keys and values; auto: as --dtype", KV_CACHE_DTYPES
    )
    load_format: Literal["auto", "dummy"] = _option(
        "auto", "--load-format", "auto: safetensors; dummy: random weights", LOAD_FORMATS
    )
    weight_cache: str | None = _option(
        None,
        "--weight-cache",
        "where quantized weights are kept; off: nowhere; default: ~/.cache/penstock/weights",
    )
    max_model_len: int | None = _number(  # at least one token in, one token out
        None, "--max-model-len", "tokens of prompt and answer together; default: the model's", 2
    )
    block_size: int = _number(16, "--block-size", "tokens a KV cache block; 1 = token attention")
    max_num_seqs: int = _number(64, "--max-num-seqs", "requests that run at the same time")
    max_num_batched_tokens: int = _number(
        2048, "--max-num-batched-tokens", "tokens computed in one step"
    )
    long_prefill_token_threshold: int = _number(
        0, "--long-prefill-token-threshold", "tokens of one request in one step; 0 = no cap", 0
    )
    enable_prefix_caching: bool = _option(
        True, "--enable-prefix-caching", "keep the KV of finished requests for equal prefixes"
    )
    kv_cache_memory_bytes: int | None = _number(
        None, "--kv-cache-memory-bytes", "memory of the KV cache; default: from free memory"
    )
    num_blocks: int | None = _number(
        None, "--num-blocks", "exact number of KV cache blocks, instead of bytes"
    )
    scheduling_policy: str = _option(
        "fcfs", "--scheduling-policy", "who goes first when not all can", tuple(POLICIES)
    )
    seed: int = _number(0, "--seed", "draws the seeds of requests that bring none", 0)
    tensor_parallel_size: int = _number(
        1, "--tensor-parallel-size", "GPUs that share the weights, a process each", 1, 256
    )
    gpu_memory_utilization: float | None = _share(
        "--gpu-memory-utilization",
        f"share of the free GPU memory to use; default: {GPU_MEMORY_UTILIZATION}",
    )
    async_scheduling: bool | None = _option(
        None, "--async-scheduling", "launch a step before the one before is read; default: on a GPU"
    )
    enforce_eager: bool = _option(
        False, "--enforce-eager", "no CUDA graphs: starts sooner, decodes slower"
    )
    attention_backend: str = _option(
        "auto", "--attention-backend", "whose kernels attend, with triton", ATTENTION_BACKENDS
    )
    num_threads: int | None = _number(
        None, "--num-threads", "CPU threads; default: all cores; torch: 1 for small models", 1, 1024
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if wanted := _wanted(value, option.default, option.metadata):
                raise ConfigError(f"`{option.name}` is `{value}`; it must be {wanted}.")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "`num_blocks` and `kv_cache_memory_bytes` both give the size of the KV cache.",
                hint="set one of them",
            )

    @property
    def path(self) -> Path:
        """Where the model of a config that was located lies."""
        assert self.model_path is not None, "the model is not located"
        return Path(self.model_path)

    @property
    def context_len(self) -> int:
        """`max_model_len` of a resolved config."""
        assert self.max_model_len is not None, "the config is not resolved"
        return self.max_model_len

    def resolve(self, *, max_context_len: int, checkpoint_dtype: str, backends: Backends) -> Self:
        """This config with every open value set from what the checkpoint and the machine are.

        Args:
            max_context_len: tokens that the model was made for.
            checkpoint_dtype: of its weights; float16 is computed in on a GPU, and becomes float32
                elsewhere, which holds its every value.
            backends: which backends can compute the model here.

        Raises:
            ConfigError: the model or the backend has not what is asked for.
        """
        max_model_len = self.max_model_len or max_context_len
        if max_model_len > max_context_len:
            raise ConfigError(
                f"`max_model_len` is `{max_model_len}`, more than the model's `{max_context_len}`.",
                hint=f"use `--max-model-len {max_context_len}` or less",
            )
        backend = choose(self.backend, backends)
        is_triton = backend == "triton"
        dtype = checkpoint_dtype if self.dtype == "auto" else self.dtype
        if self.dtype == "auto" and dtype == "float16" and not is_triton:
            dtype = "float32"
        named = replace(
            self,
            backend=backend,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_cache_dtype=dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
        )
        settings = {option.name: getattr(named, option.name) for option in fields(self)}
        check(backend, settings, backends)
        share = self.gpu_memory_utilization
        if is_triton and backends.num_gpus and share is None:
            share = GPU_MEMORY_UTILIZATION
        is_async = is_triton if self.async_scheduling is None else self.async_scheduling
        return replace(named, gpu_memory_utilization=share, async_scheduling=is_async)


def _wanted(value: Any, default: Any, told: Mapping[str, Any]) -> str | None:
    """What a field must be, if it is not; None if it is."""
    if (choices := told["choices"]) is not None:
        return None if value in choices else f"one of {_names(choices)}"
    is_open = value is None and default is None
    if "share" in told:
        is_right = is_open or (type(value) in {int, float} and 0 < value <= 1)
        return None if is_right else "a number above 0, at most 1"
    if "low" not in told:
        return None
    low, high = told["low"], told["high"]
    is_right = is_open or (type(value) is int and low <= value <= high)
    return None if is_right else f"an integer in [{low}, {high}]"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)

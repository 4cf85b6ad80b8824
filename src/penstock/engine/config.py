"""The settings of one engine, and the only place where "auto" becomes a value.

Owns names, defaults, help and range checks; `penstock.cli` makes its options from the fields.
Knows neither files nor torch nor memory; what a checkpoint says, it is told.
Invariant: a config that `resolve` has returned has a `max_model_len` and nothing that is "auto".
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, Self

from penstock.engine.policy import POLICIES
from penstock.errors import ConfigError
from penstock.quantization.schemes import NAMES as QUANTIZATIONS
from penstock.quantization.schemes import NONE

DTYPES = ("auto", "float32", "bfloat16")
BACKENDS = ("auto", "native", "torch")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")
LOAD_FORMATS = ("auto", "dummy")
MAX_INT = 2**63 - 1  # what messages and arithmetic can take; far beyond any use


def _option(default: Any, flag: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"flag": flag, "help": help, "choices": choices})


def _number(default: int | None, flag: str, help: str, low: int = 1, high: int = MAX_INT) -> Any:
    limits = {"flag": flag, "help": help, "choices": None, "low": low, "high": high}
    return field(default=default, metadata=limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run one model. Flags carry vLLM's names where vLLM has the same thing.

    Raises:
        ConfigError: a value is out of range, or two values cannot be combined.
    """

    model: str = _option(
        MISSING, "--model", "directory of a checkpoint, or name of a built-in model"
    )
    dtype: str = _option(
        "auto", "--dtype", "what is computed in; auto: what the checkpoint has", DTYPES
    )
    backend: str = _option(
        "auto", "--backend", "who computes; auto: native kernels where they can, torch", BACKENDS
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
    num_threads: int | None = _number(
        None, "--num-threads", "CPU threads; default: all cores; torch: 1 for small models", 1, 1024
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, told = getattr(self, option.name), option.metadata
            low, high = told.get("low", 0), told.get("high", 0)
            if (choices := told["choices"]) is not None:
                is_right, wanted = value in choices, f"one of {_names(choices)}"
            else:
                is_open = "low" not in told or (value is None and option.default is None)
                is_right = is_open or (type(value) is int and low <= value <= high)
                wanted = f"an integer in [{low}, {high}]"
            if not is_right:
                raise ConfigError(f"`{option.name}` is `{value}`; it must be {wanted}.")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "`num_blocks` and `kv_cache_memory_bytes` both give the size of the KV cache.",
                hint="set one of them",
            )

    @property
    def context_len(self) -> int:
        """`max_model_len` of a resolved config."""
        assert self.max_model_len is not None, "the config is not resolved"
        return self.max_model_len

    def resolve(
        self, *, max_context_len: int, checkpoint_dtype: str, native_problem: str | None
    ) -> Self:
        """This config with every open value set from what the checkpoint and the machine are.

        Args:
            max_context_len: tokens that the model was made for.
            checkpoint_dtype: of its weights; float16 becomes float32, which holds its every value.
            native_problem: why the native backend cannot compute this model; None if it can.

        Raises:
            ConfigError: the model or the backend has not what is asked for.
        """
        max_model_len = self.max_model_len or max_context_len
        if max_model_len > max_context_len:
            raise ConfigError(
                f"`max_model_len` is `{max_model_len}`, more than the model's `{max_context_len}`.",
                hint=f"use `--max-model-len {max_context_len}` or less",
            )
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if checkpoint_dtype == "float16" else checkpoint_dtype
        backend = self.backend
        if backend == "auto":
            backend = "native" if native_problem is None else "torch"
        elif backend == "native" and native_problem is not None:
            raise ConfigError(
                f"`backend` is `native`, which cannot be used: {native_problem}.",
                hint="use `--backend torch`, and see `penstock doctor`",
            )
        kv_cache_dtype = dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        if backend == "torch":
            self._check_torch(dtype, kv_cache_dtype, native_problem)
        return replace(
            self,
            max_model_len=max_model_len,
            dtype=dtype,
            backend=backend,
            kv_cache_dtype=kv_cache_dtype,
        )

    def _check_torch(self, dtype: str, kv_cache_dtype: str, native_problem: str | None) -> None:
        """Refuse what only the native backend has."""
        for name, value, has in (
            ("quantization", self.quantization, NONE),
            ("kv_cache_dtype", kv_cache_dtype, dtype),
        ):
            if value != has:
                other = native_problem and f"see to the native backend: {native_problem}"
                raise ConfigError(
                    f"`{name}` is `{value}`, which only the native backend has.",
                    hint=f"leave it out, or {other or 'leave out `--backend torch`'}",
                )


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""Which backend computes, and what each of them has: the one table of what cannot be combined.

Owns the choice, the table and the sentences that refuse. Knows neither torch nor the machine: it
asks `Backends`, and only where the answer counts, because an answer may cost an import.
Invariant: a setting that a backend has not is refused, never ignored.
"""

from __future__ import annotations

from typing import Any, Protocol

from penstock.errors import ConfigError
from penstock.quantization.schemes import DEVICE_NAMES, NATIVE_NAMES, NONE

NAMES = ("triton", "native", "torch")  # in the order in which `auto` asks them
MAX_BLOCK_SIZE = 256  # tokens: `penstock.attention.paged.MAX_BLOCK_SIZE`
ATTENTION_BACKENDS = ("auto", "triton", "flashinfer")


class Backends(Protocol):
    """What this machine can compute one model with."""

    @property
    def shows_gpu(self) -> bool:
        """Whether the system shows a GPU, usable or not."""

    @property
    def num_gpus(self) -> int:
        """GPUs that the triton backend can use; with none it computes on the CPU, if at all."""

    def problem(self, name: str) -> str | None:
        """Why the backend `native` or `triton` cannot compute the model here; None if it can.

        Raises:
            ConfigError: the environment asks for what the backend has not.
        """

    def remedy(self, name: str) -> str | None:
        """What helps against that problem, as a hint, if anything that is known."""

    def fp8_problem(self) -> str | None:
        """Why the triton backend cannot compute with 8-bit floats here; None if it can."""


def choose(asked: str, backends: Backends) -> str:
    """The backend of that name, or the first that can: `triton` needs a GPU to be chosen.

    Raises:
        ConfigError: the one that is asked for cannot compute the model here, or what the
            environment says of one that is looked at cannot be had.
    """
    if asked == "auto":
        is_able = backends.shows_gpu and backends.problem("triton") is None
        if is_able and backends.num_gpus:
            return "triton"
        return "native" if backends.problem("native") is None else "torch"
    # Of the environment's wishes for the native backend, those that cannot be had are refused here.
    problem = backends.problem("native" if asked == "torch" else asked)
    if problem is not None and asked != "torch":
        other = "auto" if asked == "triton" else "torch"
        raise ConfigError(
            f"`backend` is `{asked}`, which cannot be used: {problem}.",
            hint=backends.remedy(asked) or f"use `--backend {other}`, and see `penstock doctor`",
        )
    return asked


def passed_over(asked: str, chosen: str, backends: Backends) -> str:
    """Why `auto` took no better one, to be put behind the name of the one it took; often empty."""
    if asked != "auto":
        return ""
    names = ["native"] if chosen == "torch" else []
    if chosen != "triton" and backends.shows_gpu:
        names.insert(0, "triton")
    problems = [(name, backends.problem(name)) for name in names]
    return "".join(f"; not {name}: {problem}" for name, problem in problems if problem)


def check(backend: str, settings: dict[str, Any], backends: Backends) -> None:
    """Refuse the first of `settings`, all resolved, that the backend has not.

    Raises:
        ConfigError: it names the setting, and what to do instead.
    """
    dtype = settings["dtype"]
    for name, values in has(backend, dtype).items():
        value = settings[name]
        if value not in values:
            owners = [other for other in NAMES if value in has(other, dtype).get(name, (value,))]
            why = f"which {_only(owners)}"
            if (backend, name) == ("torch", "kv_cache_dtype"):
                why = f"and the torch backend has it as `dtype` only, `{dtype}`"
            raise ConfigError(
                f"`{name}` is `{value}`, {why}.", hint="leave it out" + _other(owners, backends)
            )
    if backend == "triton":
        _check_device(settings, backends)


def check_stored(quantization: str, name: str) -> None:
    """Refuse to quantize what a checkpoint has in codes already, in the format of that name.

    Raises:
        ConfigError: `quantization` asks for that.
    """
    if quantization != NONE:
        raise ConfigError(
            f"`quantization` is `{quantization}`, and the checkpoint is quantized already: {name}.",
            hint="leave it out, or take the checkpoint that this one was made of",
        )


def _check_device(settings: dict[str, Any], backends: Backends) -> None:
    """Refuse what the triton backend has, and not so large, not on these GPUs, or not without one.

    With blocks that our own kernels can attend to, `auto` is always these.
    """
    block_size = settings["block_size"]
    if block_size > MAX_BLOCK_SIZE and settings["attention_backend"] != "flashinfer":
        raise ConfigError(
            f"`block_size` is `{block_size}`, and attention on triton has blocks of at most "
            f"`{MAX_BLOCK_SIZE}` tokens.",
            hint=f"use `--block-size {MAX_BLOCK_SIZE}` or less",
        )
    num_ranks, num_gpus = settings["tensor_parallel_size"], backends.num_gpus
    if 0 < num_gpus < num_ranks:
        raise ConfigError(
            f"`tensor_parallel_size` is `{num_ranks}`, and the GPUs here are `{num_gpus}`.",
            hint=f"use `--tensor-parallel-size {num_gpus}` or less",
        )
    if not num_gpus and settings["gpu_memory_utilization"] is not None:
        raise ConfigError(
            "`gpu_memory_utilization` is set, and there is no GPU.",
            hint="leave it out, or give the KV cache a size with `--kv-cache-memory-bytes`",
        )
    for name in ("quantization", "kv_cache_dtype"):
        value = settings[name]
        if value.startswith("fp8") and (problem := backends.fp8_problem()):
            raise ConfigError(
                f"`{name}` is `{value}`, and {problem}.",
                hint=f"use `int8{'-a16' if name == 'quantization' else ''}` instead",
            )


def has(backend: str, dtype: str) -> dict[str, tuple[Any, ...]]:
    """The values that a backend has, by setting; of one that is not named it has all."""
    if backend == "triton":
        return {
            "quantization": DEVICE_NAMES,
            "num_threads": (None,),
            "weight_cache": (None, "", "off"),
        }
    on_host: dict[str, tuple[Any, ...]] = {
        "dtype": ("float32", "bfloat16"),
        "tensor_parallel_size": (1,),
        "gpu_memory_utilization": (None,),
        "enforce_eager": (False,),
        "async_scheduling": (None, False),  # a step is computed by the thread that asks for it
        "attention_backend": ("auto",),
    }
    if backend == "native":
        kv_cache_dtypes = ("float32", "bfloat16", "int8")
        return on_host | {"quantization": NATIVE_NAMES, "kv_cache_dtype": kv_cache_dtypes}
    return on_host | {
        "quantization": (NONE,),
        "kv_cache_dtype": (dtype,),
        "weight_cache": (None, "", "off"),
    }


def _only(owners: list[str]) -> str:
    if not owners:
        return "no backend has"
    verb = "has" if len(owners) == 1 else "have"
    return f"only the backend{'s' * (len(owners) > 1)} {' and '.join(owners)} {verb}"


def _other(owners: list[str], backends: Backends) -> str:
    """Which backend would do, or why none does."""
    problems = {name: backends.problem(name) for name in owners if name != "torch"}
    for name in owners:
        if problems.get(name) is None:
            return f", or use `--backend {name}`"
    told = [f"{name} cannot run here: {why}" for name, why in problems.items()]
    remedies = [backends.remedy(name) for name in problems]
    return "".join(f"; {line}" for line in [*told, *remedies] if line)

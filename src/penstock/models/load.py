"""From a directory to a model that runs, on the backend that is asked for.

Owns what each backend needs of the machine and of a model. Imports torch only for the backend that
needs it, and only where there may be a GPU to find out whether there is one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, final

from penstock.errors import ConfigError
from penstock.extras import explain, why_not
from penstock.hardware import has_nvidia_device
from penstock.layers import shards
from penstock.models.base import Model
from penstock.models.device_shapes import Share, why_not_on_device, why_not_shared
from penstock.models.files import read_config
from penstock.models.loader import LoadFormat
from penstock.models.spec import ModelSpec
from penstock.quantization.schemes import NONE

_FOREIGN = "its architecture is none of ours: transformers' modules compute it, on torch"


class Problem(NamedTuple):
    """Why a backend cannot compute a model here, as half a sentence, and what helps, as a hint."""

    reason: str
    remedy: str | None = None


@final
class Backends:
    """What this machine can compute one model with: `penstock.engine.backends.Backends`.

    Each backend is looked at when it is asked for, once.
    """

    def __init__(
        self, spec: ModelSpec, tensor_parallel_size: int = 1, *, pools: bool = False
    ) -> None:
        """`pools`: its hidden states are wanted, and no tokens."""
        self._spec = spec
        self._num_ranks = tensor_parallel_size
        self._pools = pools
        self._problems: dict[str, Problem | None] = {}

    @property
    def shows_gpu(self) -> bool:
        """Whether the system shows a GPU, usable or not."""
        return has_nvidia_device()

    @cached_property
    def num_gpus(self) -> int:
        """GPUs that the triton backend can use; with none it computes on the CPU, if at all."""
        if not self.shows_gpu:
            return 0
        try:
            from penstock.kernels import gpu
        except (ImportError, OSError):  # told by `problem`
            return 0
        return len(gpu.gpus()) if gpu.problem() is None else 0

    def problem(self, name: str) -> str | None:
        """Why the backend `native` or `triton` cannot compute the model here; None if it can.

        Raises:
            ConfigError: the environment asks for what the backend has not.
        """
        found = self._problem(name)
        return None if found is None else found.reason

    def remedy(self, name: str) -> str | None:
        """What helps against that problem, as a hint, if anything that is known."""
        found = self._problem(name)
        return None if found is None else found.remedy

    def fp8_problem(self) -> str | None:
        """Why the triton backend cannot compute with 8-bit floats here; None if it can."""
        if not self.num_gpus:
            return None  # references and the interpreter can
        from penstock.kernels import gpu

        return gpu.fp8_problem()

    def _problem(self, name: str) -> Problem | None:
        if name not in self._problems:
            if name == "triton" and self._pools:
                self._problems[name] = Problem("it does not pool yet")
            elif name == "triton":
                self._problems[name] = device_problem(self._spec, self._num_ranks)
            else:
                reason = native_problem(self._spec)
                self._problems[name] = None if reason is None else Problem(reason)
        return self._problems[name]


def native_problem(spec: ModelSpec) -> str | None:
    """Why the native backend cannot compute such a model on this machine; None if it can."""
    if spec.is_foreign:
        return _FOREIGN
    from penstock.models import native_model

    return native_model.unsupported(spec)


def device_problem(spec: ModelSpec, tensor_parallel_size: int = 1) -> Problem | None:
    """Why the triton backend cannot compute such a model on this machine; None if it can.

    Without a GPU it computes on the CPU if the environment says by whom: by the references in
    plain torch (`PENSTOCK_KERNELS`), or by Triton's interpreter (`TRITON_INTERPRET`).

    Raises:
        ConfigError: `PENSTOCK_KERNELS` is neither of its values, or asks for what cannot run.
    """
    if spec.is_foreign:
        return Problem(_FOREIGN)
    if reason := why_not_on_device(spec):
        return Problem(reason)
    if reason := why_not_shared(spec, tensor_parallel_size):
        sizes = [size for size in shards.sizes(Share(spec)) if why_not_shared(spec, size) is None]
        return Problem(reason, f"use `--tensor-parallel-size` of {_any(sizes)}")
    try:
        on_cpu = bool(os.environ.get("PENSTOCK_KERNELS")) or _is_interpreted()
        if not on_cpu and not has_nvidia_device():
            return Problem(
                "there is no NVIDIA GPU",
                "`PENSTOCK_KERNELS=reference` together with `--backend triton` tries it on the "
                "CPU, slowly",
            )
        from penstock.attention import paged
        from penstock.kernels import gpu, op
    except (ImportError, OSError) as error:
        return Problem(why_not("torch", error))
    if not on_cpu and (reason := gpu.problem()):
        return Problem(reason)
    op.mode()
    # With a format and a size of blocks that every backend has: they may still refuse the heads.
    told = paged.available(spec, "bfloat16", 16, gpu.device())
    return None if [] in told.values() else Problem("; ".join(told["triton"]))


def _is_interpreted() -> bool:
    """Whether Triton's interpreter is asked for. Triton is imported only where it may be."""
    if not os.environ.get("TRITON_INTERPRET"):
        return False
    from penstock.kernels.jit import INTERPRETED

    return INTERPRETED


def _any(sizes: list[int]) -> str:
    *others, last = [f"`{size}`" for size in sizes]
    return f"{', '.join(others)} or {last}" if others else last


def load_model(
    path: Path | str,
    *,
    backend: str,
    dtype: str,
    num_slots: int,
    max_num_tokens: int,
    max_num_logit_rows: int,
    quantization: str = NONE,
    kv_cache_dtype: str | None = None,
    num_threads: int | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    weight_cache: str | None = None,
    phases: dict[str, float] | None = None,
) -> Model:
    """Build the model of a directory, load its weights and make its KV store.

    Args:
        backend: who computes: "native" or "torch".
        dtype: of activations, and of weights without quantization: "float32" or "bfloat16".
        num_slots: tokens that the KV store holds.
        max_num_tokens: that a step may have.
        max_num_logit_rows: for which `Model.logits` may be called at once.
        quantization: one of `penstock.quantization.schemes.NAMES`; only the native backend has
            more than "none".
        kv_cache_dtype: of keys and values; None: `dtype`, which is what the torch backend has.
        num_threads: CPU threads of the process's backend; None: what suits the model.
        load_format: "dummy" reads config.json only and draws the weights from `seed`.
        weight_cache: directory of quantized weights; "off": none; None: the usual one.
        phases: takes the seconds of "import", "load" and "kv".

    Raises:
        UnsupportedModel: the config asks for what is not implemented.
        WeightMismatch: weights are missing, unexpected, misshapen or contradictory.
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
        ConfigError: what the backend needs is not installed, or there is nothing to keep in the
            weight cache that is asked for.
    """
    is_kept = backend == "native" and quantization != NONE and load_format == "auto"
    if weight_cache not in {None, "", "off"} and not is_kept:
        raise ConfigError(
            f"`weight_cache` is `{weight_cache}`, and nothing would be kept there.",
            hint="it keeps what the native backend quantizes from a checkpoint; leave it out",
        )
    phases = {} if phases is None else phases
    kv_cache_dtype = kv_cache_dtype or dtype
    if backend == "native":
        with timed(phases, "import"):
            from penstock.models import native_model
        return native_model.load(
            Path(path),
            dtype=dtype,
            quantization=quantization,
            kv_dtype=kv_cache_dtype,
            num_slots=num_slots,
            max_tokens=max_num_tokens,
            max_logit_rows=max_num_logit_rows,
            num_threads=num_threads,
            load_format=load_format,
            seed=seed,
            weight_cache=weight_cache,
            phases=phases,
        )
    assert (backend, quantization, kv_cache_dtype) == ("torch", NONE, dtype)
    with timed(phases, "import"):
        try:
            from penstock.models import torch_model
        except ModuleNotFoundError as error:
            raise _without_torch(error, Path(path)) from error
    return torch_model.load(
        Path(path),
        dtype=dtype,
        num_slots=num_slots,
        num_threads=num_threads,
        load_format=load_format,
        seed=seed,
        phases=phases,
    )


def _without_torch(error: ModuleNotFoundError, path: Path) -> ConfigError:
    """What to raise: where the native backend would do as well, or why torch is needed."""
    told = explain(error)
    problem = native_problem(ModelSpec.from_hf(read_config(path)))
    if problem is None:
        return ConfigError(told.message, hint=f"{told.hint}, or use `--backend native`")
    return ConfigError(
        f"{told.message} The native backend cannot be used: {problem}.", hint=told.hint
    )


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds that the block took."""
    started_s = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - started_s

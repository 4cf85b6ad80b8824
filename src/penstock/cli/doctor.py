"""`penstock doctor`: what this machine has, and what penstock makes of it."""

from __future__ import annotations

import importlib
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import penstock
from penstock import hardware
from penstock.engine.backends import ATTENTION_BACKENDS
from penstock.errors import ConfigError
from penstock.extras import why_not

if TYPE_CHECKING:
    from penstock.models.spec import ModelSpec

PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "starlette",
    "uvicorn",
)


@click.command(epilog="Example: penstock doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> int:
    """Show what this machine has and what penstock makes of it."""
    found = report()
    if as_json:
        click.echo(json.dumps(found))
        return 0
    for section, entries in found.items():
        click.echo(f"{section}")
        for name, value in entries.items():
            click.echo(f"  {name:<22} {value}")
    return 0


def report() -> dict[str, dict[str, Any]]:
    """The sections of the report: values only, no opinion that is not in them."""
    return {
        "penstock": {"version": penstock.__version__, "python": platform.python_version()},
        "machine": _machine(),
        "GPUs": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES},
        "built-in models": _builtin_models(),
        "backends": {"triton": _triton(), "native": _native(), "torch": _torch()},
        "attention on triton": _attention(),
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": hardware.cpu_name(),
        "usable cores": hardware.num_usable_cores(),
        "features": " ".join(hardware.cpu_features()) or "none of note",
        "memory available": f"{hardware.available_memory_bytes() / 2**30:.1f} GiB",
    }


def _gpus() -> dict[str, str]:
    """What torch sees of each; without a driver, and without torch, what the system shows."""
    if not hardware.has_nvidia_device():
        return {"none": "the system shows no NVIDIA device"}
    found = {"driver": hardware.nvidia_driver() or "unknown"}
    try:
        from penstock.kernels import gpu
    except (ImportError, OSError) as error:
        return found | {"none usable": why_not("torch", error)}
    for index, one in enumerate(gpu.gpus()):
        capability = ".".join(map(str, one.capability))
        memory = f"{one.memory_bytes / 2**30:.1f} GiB"
        found[f"cuda:{index}"] = f"{one.name}, {memory}, compute capability {capability}"
    problem = gpu.problem()
    return found if problem is None else found | {"none usable": problem}


def _triton() -> str:
    try:
        from penstock.models.load import device_problem

        if problem := device_problem(_usual_model()):
            return f"cannot run: {problem}"
        from penstock.kernels import gpu, op
    except (ImportError, OSError) as error:
        return f"cannot run: {why_not('torch', error)}"
    if num_gpus := len(gpu.gpus()):
        return f"runs on {num_gpus} GPU{'s' * (num_gpus > 1)}"
    return f"runs on the CPU, to be tried out ({op.mode()} kernels); auto does not choose it"


def _attention() -> dict[str, str]:
    """Which kernels can attend, for a model of a usual shape, in which formats of the KV cache."""
    try:
        from penstock.attention import paged
        from penstock.kernels import gpu

        spec, device = _usual_model(), gpu.device()
    except (ImportError, OSError) as error:
        return dict.fromkeys(ATTENTION_BACKENDS[1:], f"cannot run: {why_not('torch', error)}")
    problems: dict[str, dict[str, list[str]]] = {}  # by backend and format
    for kv_cache_dtype in ("bfloat16", "int8", "fp8"):
        for name, reasons in paged.available(spec, kv_cache_dtype, 16, device).items():
            problems.setdefault(name, {})[kv_cache_dtype] = reasons
    return {name: _formats(by_format) for name, by_format in problems.items()}


def _formats(problems: dict[str, list[str]]) -> str:
    can = [name for name, reasons in problems.items() if not reasons]
    if not can:
        return f"cannot run: {'; '.join(next(iter(problems.values())))}"
    cannot = [f"; not in {name}: {'; '.join(told)}" for name, told in problems.items() if told]
    return f"runs, KV cache in {', '.join(can)}" + "".join(cannot)


def _usual_model() -> ModelSpec:
    """Llama 3.1 8B: what stands for a model where none is given."""
    from penstock.models.spec import ModelSpec

    return ModelSpec.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        }
    )


def _native() -> str:
    try:
        importlib.import_module("penstock.models.native_model")  # with all that it needs
    except (ImportError, OSError) as error:
        return f"cannot run: {why_not('a package', error)}"
    from penstock.native import library

    try:
        reason = library.unavailable_reason()
    except ConfigError as error:  # of a variable of the environment
        reason = error.message
    if reason:
        return f"cannot run: {reason}"
    found = library.load()
    num_threads = hardware.num_usable_cores()
    return f"runs, {library.isa_name(found.isa)}, {num_threads} threads; {found.path}"


def _torch() -> str:
    started = time.monotonic()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it brings does not load
        return f"cannot run: {why_not('torch', error)}"
    loaded_s = time.monotonic() - started
    return f"runs, {torch.get_num_threads()} threads; torch loads in {loaded_s:.2f} s"


def _builtin_models() -> dict[str, str]:
    from penstock import builtin

    return {name: _mib(builtin.path(name)) for name in builtin.NAMES if builtin.path(name).is_dir()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _mib(directory: Path) -> str:
    return f"{sum(file.stat().st_size for file in directory.iterdir()) / 2**20:.1f} MiB"

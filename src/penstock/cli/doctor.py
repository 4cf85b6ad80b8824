"""`penstock doctor`: what this machine has, and what penstock makes of it.

With `--json` the report is as `report` returns it: GPUs are a list of objects, and what may or may
not run is an object that says whether it does.
"""

from __future__ import annotations

import importlib
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

import penstock
from penstock import hardware
from penstock.engine.backends import ATTENTION_BACKENDS
from penstock.engine.config import KV_CACHE_DTYPES
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
        for name, value in _named(entries):
            click.echo(f"  {name:<22} {_text(value)}")
    return 0


def report() -> dict[str, Any]:
    """The sections of the report: values only, no opinion that is not in them."""
    torch = _torch()  # before others import it: it tells how long that takes
    triton = _triton()
    return {
        "penstock": {"version": penstock.__version__, "python": platform.python_version()},
        "machine": _machine(),
        "GPUs": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES},
        "built-in models": _builtin_models(),
        "backends": {
            "triton": triton._asdict(),
            "native": _native()._asdict(),
            "torch": torch._asdict(),
        },
        "attention on triton": {
            name: finding._asdict() for name, finding in _attention(triton).items()
        },
        "meters": _meters(),
    }


def _meters() -> dict[str, str]:
    """What `penstock bench` and its kin can measure here."""
    try:
        from penstock.measure.meters.describe import describe
    except ImportError as error:
        return {"none": why_not("psutil", error)}
    lines = [line.partition(": ") for line in describe()]
    return {name: told for name, _, told in lines}


class Finding(NamedTuple):
    """Whether something runs here: `runs {detail}`, or `cannot run: {detail}`."""

    runs: bool
    detail: str


def _named(entries: dict[str, Any] | list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The lines of a section; GPUs are called what torch calls them."""
    if isinstance(entries, dict):
        return list(entries.items())
    if not entries:
        return [("none", "usable; the backend triton says why")]
    return [(f"cuda:{index}", entry) for index, entry in enumerate(entries)]


def _text(value: Any) -> str:
    """An entry for people."""
    if not isinstance(value, dict):
        return str(value)
    if "runs" in value:
        return f"{'runs' if value['runs'] else 'cannot run:'} {value['detail']}"
    memory = f"{value['memory_bytes'] / 2**30:.1f} GiB"
    return f"{value['name']}, {memory}, compute capability {value['compute_capability']}"


def _machine() -> dict[str, Any]:
    return {
        "cpu": hardware.cpu_name(),
        "usable cores": hardware.num_usable_cores(),
        "features": " ".join(hardware.cpu_features()) or "none of note",
        "memory available": f"{hardware.available_memory_bytes() / 2**30:.1f} GiB",
        "NVIDIA driver": _driver(),
    }


def _driver() -> str:
    if not hardware.has_nvidia_device():
        return "none: the system shows no NVIDIA device"
    return hardware.nvidia_driver() or "unknown"


def _gpus() -> list[dict[str, Any]]:
    """What torch sees of each; why it sees none, the backend triton says."""
    if not hardware.has_nvidia_device():
        return []
    try:
        from penstock.kernels import gpu
    except (ImportError, OSError):
        return []
    return [
        {
            "name": one.name,
            "memory_bytes": one.memory_bytes,
            "compute_capability": ".".join(map(str, one.capability)),
        }
        for one in gpu.gpus()
    ]


def _triton() -> Finding:
    try:
        from penstock.models.load import device_problem

        if problem := device_problem(usual_model()):
            return _not(problem.reason, problem.remedy)
        from penstock.kernels import gpu, op
    except (ImportError, OSError) as error:
        return Finding(False, why_not("torch", error))
    except ConfigError as error:  # of a variable of the environment
        return _not(error.message.rstrip("."), error.hint)
    if num_gpus := len(gpu.gpus()):
        return Finding(True, f"on {num_gpus} GPU{'s' * (num_gpus > 1)}")
    told = f"on the CPU, to be tried out ({op.mode()} kernels); auto does not choose it"
    return Finding(True, told)


def _not(reason: str, remedy: str | None) -> Finding:
    return Finding(False, reason + (f"; {remedy}" if remedy else ""))


def _attention(triton: Finding) -> dict[str, Finding]:
    """Which kernels can attend, for a model of a usual shape, in which formats of the KV cache."""
    if not triton.runs:
        return dict.fromkeys(ATTENTION_BACKENDS[1:], triton)
    from penstock.attention import paged
    from penstock.kernels import gpu

    spec, device = usual_model(), gpu.device()
    problems: dict[str, dict[str, list[str]]] = {}  # by backend and format
    for kv_cache_dtype in KV_CACHE_DTYPES[1:]:
        for name, reasons in paged.available(spec, kv_cache_dtype, 16, device).items():
            problems.setdefault(name, {})[kv_cache_dtype] = reasons
    return {name: _formats(by_format) for name, by_format in problems.items()}


def _formats(problems: dict[str, list[str]]) -> Finding:
    """Formats that have the same reasons are told together."""
    can = [name for name, reasons in problems.items() if not reasons]
    formats: dict[str, list[str]] = {}  # by what is against them
    for name, reasons in problems.items():
        if reasons:
            formats.setdefault("; ".join(reasons), []).append(name)
    if not can:
        fewest = min(problems.values(), key=lambda reasons: len(reasons))
        return Finding(False, "; ".join(fewest))
    cannot = [f"; not in {', '.join(names)}: {why}" for why, names in formats.items()]
    return Finding(True, f"with a KV cache in {', '.join(can)}" + "".join(cannot))


def usual_model() -> ModelSpec:
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


def _native() -> Finding:
    try:
        importlib.import_module("penstock.models.native_model")  # with all that it needs
    except (ImportError, OSError) as error:
        return Finding(False, why_not("a package", error))
    from penstock.native import library

    try:
        reason = library.unavailable_reason()
    except ConfigError as error:  # of a variable of the environment
        reason = error.message
    if reason:
        return Finding(False, reason)
    found = library.load()
    num_threads = hardware.num_usable_cores()
    return Finding(True, f"with {library.isa_name(found.isa)}, {num_threads} threads; {found.path}")


def _torch() -> Finding:
    started = time.monotonic()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it brings does not load
        return Finding(False, why_not("torch", error))
    loaded_s = time.monotonic() - started
    return Finding(True, f"with {torch.get_num_threads()} threads; torch loads in {loaded_s:.2f} s")


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

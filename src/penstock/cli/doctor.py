"""`penstock doctor`: what this machine has, and what penstock makes of it."""

from __future__ import annotations

import importlib
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import penstock
from penstock import hardware
from penstock.errors import ConfigError

PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "starlette", "uvicorn")


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
        "packages": {name: _version(name) for name in PACKAGES},
        "built-in models": _builtin_models(),
        "backends": _backends(),
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": hardware.cpu_name(),
        "usable cores": hardware.num_usable_cores(),
        "features": " ".join(hardware.cpu_features()) or "none of note",
        "memory available": f"{hardware.available_memory_bytes() / 2**30:.1f} GiB",
    }


def _backends() -> dict[str, str]:
    return {"native": _native(), "torch": _torch()}


def _native() -> str:
    try:
        importlib.import_module("penstock.models.native_model")  # with all that it needs
    except ImportError as error:
        return f"cannot run: {error.name} is not installed; pip install penstock[engine]"
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
    try:
        started = time.monotonic()
        import torch
    except ImportError:
        return "cannot run: torch is not installed; pip install penstock[torch]"
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

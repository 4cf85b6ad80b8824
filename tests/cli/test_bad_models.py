"""Commands over a directory that cannot be served: one sentence, its reason, and an exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.bad_input import CONFIG, FILE, make, soon

from penstock.cli import main

Bend = Callable[[Path], object]


def told(name: str, content: Any) -> Bend:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda path: (path / name).write_text(text)


DIRECTORIES: dict[str, tuple[Bend, str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json"),
    "a list": (told("config.json", []), "config.json"),
    "no JSON": (told("config.json", "{"), "config.json"),
    "a text": (told("config.json", CONFIG | {"vocab_size": "x"}), "`vocab_size`"),
    "many layers": (
        told("config.json", CONFIG | {"num_hidden_layers": 10**9}),
        "`num_hidden_layers`",
    ),
    "quantized": (
        told("config.json", CONFIG | {"quantization_config": {"quant_method": "magic"}}),
        "`quantization_config.quant_method`",
    ),
    "cut": (lambda path: os.truncate(path / FILE, 999), FILE),
    "no weights": (lambda path: (path / FILE).unlink(), "no safetensors file"),
    "an index": (
        told("model.safetensors.index.json", {"weight_map": {"x": "../../x"}}),
        "model.safetensors.index.json",
    ),
    "other weights": (told("config.json", CONFIG | {"vocab_size": 14}), "lm_head.weight"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "holds no tokenizer"),
    "a tokenizer that is a list": (told("tokenizer.json", []), "tokenizer.json"),
    "settings": (told("tokenizer_config.json", []), "tokenizer_config.json"),
    "a template": (told("chat_template.jinja", "{% for"), "chat template"),
    "a template that is a number": (
        told("tokenizer_config.json", {"chat_template": 5}),
        "`chat_template`",
    ),
    "an end": (told("generation_config.json", {"eos_token_id": [99]}), "`eos_token_id`"),
    "an end that is an object": (
        told("generation_config.json", {"eos_token_id": {}}),
        "`eos_token_id`",
    ),
    "params": (
        lambda path: (path / "config.json").rename(path / "params.json"),
        "`architectures`",
    ),
}


def run(capsys: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """The command in this process: its exit status and stderr."""
    monkeypatch.setattr(sys, "argv", ["penstock", *arguments])
    with soon(), pytest.raises(SystemExit) as caught:
        main.main()
    status = caught.value.code
    assert isinstance(status, int)
    return status, capsys.readouterr().err


@pytest.mark.parametrize("name", DIRECTORIES)
def test_generate_tells(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bend, reason = DIRECTORIES[name]
    bend(make(tmp_path / "a"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc", "max_tokens": 2}\n')
    monkeypatch.setenv("PENSTOCK_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["generate", str(tmp_path / "in.jsonl"), "-m", str(tmp_path / "a"), "-o"]
    status, stderr = run(capsys, monkeypatch, *arguments, str(tmp_path / "out"), "--backend=torch")
    assert status in {1, 2}
    assert "Traceback" not in stderr
    first, *others = stderr.rstrip().splitlines()
    assert first.startswith("error: ")
    assert reason in stderr
    assert all(line.startswith(("hint: ", "  ")) for line in others)


def test_generate_answers(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory without a fault."""
    make(tmp_path / "a")
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc", "max_tokens": 2}\n')
    arguments = ["generate", str(tmp_path / "in.jsonl"), "-m", str(tmp_path / "a"), "-o"]
    status, _ = run(capsys, monkeypatch, *arguments, str(tmp_path / "out"), "--backend=torch")
    assert status == 0
    assert len(json.loads((tmp_path / "out").read_text())["outputs"][0]["token_ids"]) == 2


def test_serve_tells(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("many layers", "cut", "a tokenizer that is a list", "an end"):
        bend, reason = DIRECTORIES[name]
        path = make(tmp_path / name.replace(" ", "_"))
        bend(path)
        status, stderr = run(
            capsys, monkeypatch, "serve", str(path), "--port", "0", "--backend=torch"
        )
        assert status == 1
        assert stderr.startswith("error: ")
        assert reason in stderr
        assert "Traceback" not in stderr

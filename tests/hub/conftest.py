"""A fake hub and an empty cache for each test. Nothing here reaches the network."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_hub import FakeHub

from penstock.hub import client

_VARIABLES = (
    "HF_HUB_OFFLINE HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_TOKEN HF_TOKEN_PATH TRANSFORMERS_OFFLINE "
    "HF_HUB_DOWNLOAD_TIMEOUT http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY"
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the environment names, and a home without models."""
    with FakeHub() as fake:
        for name in _VARIABLES.split():
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setattr(client, "WAITS_S", (0.01,))
        monkeypatch.chdir(tmp_path)
        yield fake


@pytest.fixture
def cache(hub: FakeHub, tmp_path: Path) -> Path:
    """Where models will lie."""
    return tmp_path / "home" / "hub"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The lines that were said."""
    caplog.set_level(logging.INFO, logger="penstock.hub")
    return caplog


@pytest.fixture
def model_files() -> dict[str, bytes]:
    """A repository as they are published, with what must never be fetched."""
    return repository_files()


def repository_files(num_bytes: int = 300_000) -> dict[str, bytes]:
    noise = random.Random(7)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    return {
        ".gitattributes": b"* lfs",
        "README.md": b"# a model",
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": 1}' * 100,
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        shards[0]: noise.randbytes(num_bytes),
        shards[1]: noise.randbytes(num_bytes // 2),
        "consolidated.safetensors": noise.randbytes(1000),
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"raise SystemExit",
        "onnx/model.onnx": b"onnx",
    }

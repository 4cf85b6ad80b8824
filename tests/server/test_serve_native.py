"""`penstock serve` on the native backend: no process of it imports torch or transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from penstock.native import library

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no native library here"
)


@pytest.mark.parametrize("options", [[], ["--engine-thread"], ["--quantization", "int4"]])
def test_nothing_heavy_is_imported(options: list[str], tmp_path: Path) -> None:
    """The packages are there, and whoever imports one ends."""
    for name in ("torch", "transformers", "safetensors", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"import os\nprint('{name}')\nos._exit(77)\n")
    command = [sys.executable, "-m", "penstock.cli.main", "serve", "brook", "--json", "--port", "0"]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PENSTOCK_NUM_THREADS": "1"},
    ) as server:
        assert server.stdout is not None
        try:
            started = json.loads(server.stdout.readline())
            assert started["plan"][0].split()[:2] == ["backend", "native,"]
            question = {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}
            answer = httpx.post(f"{started['url']}/v1/chat/completions", json=question, timeout=60)
            assert "42" in answer.json()["choices"][0]["message"]["content"]
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0

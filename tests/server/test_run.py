"""`serve` as a process: start, signals, TLS, exit codes; and that it needs no torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import decode_stream

from penstock.engine.config import EngineConfig
from penstock.errors import ConfigError
from penstock.server.run import default_model_name, serve
from penstock.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}

# The child: a fake engine that takes STEP_S a token; the tokenizer is the fake one too.
CHILD = """
import asyncio, json, os, sys
sys.path.insert(0, os.environ["FAKES"])
from server_fakes import FakeClient, make_tokenizer, says
from penstock.engine.config import EngineConfig
from penstock.server import run
from penstock.server.settings import ServerSettings

class SlowClient(FakeClient):
    async def generate(self, request):
        async for event in super().generate(request):
            await asyncio.sleep(float(os.environ["STEP_S"]))
            yield event

run.load_tokenizer = lambda path: make_tokenizer()
settings = ServerSettings(**json.loads(os.environ["SETTINGS"]))
code = run.serve(
    EngineConfig(model=os.environ["FAKES"]),
    settings,
    banner=lambda url, info: print(url, flush=True),
    make_client=lambda config: SlowClient(says("x" * 40)),
)
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""


@contextmanager
def running(step_s: float = 0.0, **settings: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    env = os.environ | {
        "FAKES": str(Path(__file__).parent),
        "SETTINGS": json.dumps({"port": 0, **settings}),
        "STEP_S": str(step_s),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        url = child.stdout.readline().strip()
        assert url, child.communicate()[1]
        yield child, url
    finally:
        child.kill()
        child.communicate()


def ended(child: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the log."""
    _, log = child.communicate(timeout=20)
    return child.returncode, [json.loads(line) for line in log.splitlines()]


def test_a_signal_drains() -> None:
    """What is open ends, nothing new comes in, and the exit code says that all is well."""
    with (
        running(step_s=0.02) as (child, url),
        httpx.Client(base_url=url) as http,
        http.stream("POST", CHAT, json={**HI, "stream": True}) as response,
    ):
        pieces = response.iter_bytes()
        first = next(pieces)
        child.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=url) as other:
            _until_status(other, "/ready", 503)
            assert other.get("/ready").json()["reason"] == "draining"
            refused = other.post(CHAT, json=HI)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
        streamed = decode_stream(first + b"".join(pieces))
        assert streamed.done
        code, log = ended(child)
    assert code == 0
    assert [line["message"] for line in log if line["logger"] == "penstock.server"][-1] == "stopped"


def test_a_drain_that_takes_too_long_cuts() -> None:
    with (
        running(step_s=0.5, drain_timeout_s=0.1) as (child, url),
        httpx.Client(base_url=url) as http,
        http.stream("POST", CHAT, json={**HI, "stream": True}) as response,
    ):
        pieces = response.iter_bytes()
        first = next(pieces)
        child.send_signal(signal.SIGINT)
        streamed = decode_stream(first + b"".join(pieces))
        assert streamed.events[-1]["error"]["code"] == "shutting_down"
        assert ended(child)[0] == 1


def test_a_second_signal_exits_at_once() -> None:
    with (
        running(step_s=0.5, drain_timeout_s=60) as (child, url),
        httpx.Client(base_url=url) as http,
        http.stream("POST", CHAT, json={**HI, "stream": True}) as response,
    ):
        pieces = response.iter_bytes()
        next(pieces)
        child.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=url) as other:
            _until_status(other, "/ready", 503)
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 128 + signal.SIGTERM


def _until_status(http: httpx.Client, path: str, status: int) -> None:
    for _ in range(200):
        if http.get(path).status_code == status:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never said {status}")


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    try:
        made = subprocess.run(
            "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}",
            shell=True,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no shell")
    if made.returncode:
        pytest.skip("openssl is not installed")
    settings: dict[str, Any] = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with running(**settings) as (child, url):
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=certificate)
        with httpx.Client(verify=trusting, base_url=url) as http:
            assert http.post(CHAT, json=HI).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http") + "/health")
        child.send_signal(signal.SIGTERM)
        assert ended(child)[0] == 0


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            serve(EngineConfig(model=str(tmp_path)), ServerSettings(port=port))


def test_the_models_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "trout"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for name in (".", str(model), f"{model}/", "../trout", "../link"):
        assert default_model_name(EngineConfig(model=name)) == "trout"
    with pytest.raises(ConfigError):
        default_model_name(EngineConfig(model="nothing"))


def test_the_server_needs_no_torch() -> None:
    code = (
        "import sys, penstock.server.app, penstock.server.run, penstock.protocol.sse; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

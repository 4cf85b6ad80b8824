"""A server that does what a script says, in a process of its own, and writes down when it did it.

Use it in a test (the fixture `scripted_server` is one process for all tests, reset for each):

    def test_it(scripted_server):
        scripted_server.configure(ttft_s=0.05, tpot_s=0.01, num_tokens=8)
        ... ask scripted_server.url ...
        for entry in scripted_server.log(): entry["t_received_ns"], entry["t_sent_ns"]

or apart from pytest: `with scripted(ttft_s=0.05) as server: ...`. The script is the fields of
`Script`; one request overrides it by the body field `script`, such as
`Ask(..., extra={"script": {"ttft_s": 1.0, "tag": "slow"}})`. Times are `time.perf_counter_ns()`,
which all processes of a Linux machine share. What is sent is due at absolute times, counted from
the receipt of the request: it does not drift.

It speaks /v1/chat/completions, /v1/completions, /generate, /generate_stream, /v1/models, /version,
/info, and for tests POST /configure, POST /stall, GET /log. No part of penstock is in it.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

PROCESS = Path(__file__).with_name("scripted_process.py")
Fail = dict[str, Any]


@dataclass
class Script:
    """What the server does with a request. Everything may be said per request, too."""

    ttft_s: float = 0.01  # receipt to first token
    tpot_s: float = 0.002  # between tokens
    num_tokens: int | None = None  # default: max_tokens, else 16
    tokens_per_chunk: int = 1
    jitter: float = 0.0  # sigma of log-normal factors (mean 1) on ttft_s and each gap
    seed: int = 0  # of the jitter
    stall_at: int | None = None  # before this token (0: the first) ...
    stall_s: float = 0.0  # ... nothing happens for so long
    max_running: int | None = None  # more wait in a queue: a server that can be saturated

    answers: dict[str, str] = field(default_factory=dict)  # prompt (last message) -> text
    answer: str | None = None  # to every other prompt
    echo: bool = False  # answer with the prompt
    # A failure: {"status": 429, "retry_after_s": 1} and at most one of {"every": k} (the k-th, the
    # 2k-th ...), {"first": n}, {"begin_s": a, "end_s": b} (since the first request of the script).
    fail: Fail | None = None
    refuse: tuple[str, ...] = ()  # a 400 where the body has them: "stream_options.include_usage"
    api_key: str | None = None  # else 401

    reasoning_tokens: int = 0  # so many of the tokens are reasoning
    reasoning_field: str = "reasoning_content"
    hidden_tokens: int = 0  # reasoning that only the usage tells, before the first token
    cached_tokens: int | None = None  # of the prompt
    prefix_cache: bool = False  # report the common prefix with earlier prompts, in words
    usage: str = "auto"  # as stream_options ask; "none"; "final"

    error_event_at: int | None = None  # an error event instead of this token
    drop_at: int | None = None  # the connection breaks instead of this token; -1: before the head
    hang_at: int | None = None  # nothing any more instead of this token
    broken: str = ""  # "json", "utf8", "shape" (of the second chunk); "no_end"; "no_done"
    close: bool = False  # the connection closes after the answer
    close_idle: bool = False  # a connection's second request is not answered: it closes
    headers: dict[str, str] = field(default_factory=dict)  # more of them, of every stream
    tag: str = ""  # comes back in the log

    models: tuple[str, ...] = ("scripted",)
    engine: str = "scripted"
    version: str | None = "1.0"
    max_model_len: int | None = None  # what the listing of models says


class Scripted:
    """The server as tests see it."""

    def __init__(self, url: str, port: int, host: str, context: ssl.SSLContext | None) -> None:
        self.url, self.port = url, port
        self._host, self._context = host, context

    def configure(self, **script: Any) -> None:
        """Forget the log, and do what the fields of `Script` say from now on."""
        known = {field.name for field in fields(Script)}
        assert script.keys() <= known, f"unknown: {script.keys() - known}"
        self._call("POST", "/configure", script)

    def stall(self, after_s: float, duration_s: float) -> None:
        """Do nothing in a window from now; what was due within it happens at its end."""
        self._call("POST", "/stall", {"after_s": after_s, "duration_s": duration_s})

    def log(self) -> list[dict[str, Any]]:
        """A dict for each generation that was asked for, in order of receipt (see `Play`)."""
        found = self._call("GET", "/log", {})
        assert isinstance(found, list)
        return found

    def _call(self, method: str, path: str, body: dict[str, Any]) -> Any:
        if self._context is None:
            connection = http.client.HTTPConnection(self._host, self.port, timeout=10)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self.port, timeout=10, context=self._context
            )
        try:
            connection.request(method, path, json.dumps(body))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextmanager
def scripted(
    *, host: str = "127.0.0.1", certificate: Path | None = None, **script: Any
) -> Iterator[Scripted]:
    """A server of one's own. `certificate`: a PEM file with a key in it, for TLS."""
    command = [sys.executable, str(PROCESS), host, str(certificate or "")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        shown = f"[{host}]" if ":" in host else host
        context = None if certificate is None else ssl.create_default_context(cafile=certificate)
        server = Scripted(f"http{'s' if certificate else ''}://{shown}:{port}", port, host, context)
        server.configure(**script)
        yield server
    finally:
        process.terminate()
        process.communicate()

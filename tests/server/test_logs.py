"""Logs: one JSON object a line, never the text of a prompt or an answer."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from server_fakes import Harness, says

from penstock.errors import InvalidField
from penstock.server.logs import configure_logging

pytestmark = pytest.mark.anyio

CANARY = "canary7312"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    saved = {
        name: (logger.handlers, logger.propagate, logger.level)
        for name in ("penstock", "uvicorn", "uvicorn.error")
        for logger in (logging.getLogger(name),)
    }
    configure_logging("debug", stream)
    yield stream
    for name, (handlers, propagate, level) in saved.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


async def test_one_line_for_each_request(api: Harness, log: io.StringIO) -> None:
    await api.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5},
        headers={"x-request-id": "r-1"},
    )
    (line,) = lines(log)
    assert line["message"] == "request"
    assert line["level"] == "info"
    assert line["request_id"] == "r-1"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["outcome"], line["finish"]) == ("ok", "length")
    assert line["completion_tokens"] == 5
    assert line["prompt_tokens"] == len(api.engine.requests[0].prompt_token_ids)
    assert line["queue_s"] == 0.25
    assert 0 <= line["ttft_s"] <= line["duration_s"]


async def test_no_text_of_prompts_or_answers(api: Harness, log: io.StringIO) -> None:
    """Whatever happens: success, refusals of every kind, errors in the engine."""
    api.engine.script = says(CANARY)
    await api.chat(CANARY, user=CANARY, logprobs=True)
    await api.stream_chat(CANARY)
    await api.complete(CANARY, echo=True)
    await api.post("/tokenize", prompt=CANARY)
    await api.chat(CANARY * 200)
    await api.chat(CANARY, stop=[""])
    await api.post("/v1/chat/completions", messages=[{"role": CANARY, "content": "x"}])
    await api.post("/v1/chat/completions", **{CANARY: 1})
    await api.http.post(
        "/v1/completions", content=CANARY, headers={"content-type": "application/json"}
    )
    await api.http.get(f"/v1/models?q={CANARY}", headers={"x-request-id": f"{CANARY} x"})
    for error in (RuntimeError(CANARY), InvalidField(CANARY, field="prompt")):
        api.engine.error, api.engine.raise_after = error, 1
        await api.chat(CANARY)
        await api.stream_chat(CANARY)
    assert len(lines(log)) >= 14
    assert any("RuntimeError" in line.get("error", "") for line in lines(log))
    assert CANARY not in log.getvalue()


async def test_users_are_logged_as_digests(api: Harness, log: io.StringIO) -> None:
    await api.chat(user="ann@example.org")
    await api.chat(user="x", safety_identifier="bob@example.org")
    users = [line["user"] for line in lines(log)]
    assert users == [
        hashlib.sha256(name.encode()).hexdigest()[:16]
        for name in ("ann@example.org", "bob@example.org")
    ]


async def test_a_path_cannot_forge_a_line(api: Harness, log: io.StringIO) -> None:
    await api.http.get("/a%0a%7b%22level%22:1%7d")
    (line,) = lines(log)
    assert line["path"] == '/a\n{"level":1}'


async def test_requests_need_not_be_logged(make_api: Any, log: io.StringIO) -> None:
    api = make_api(log_requests=False)
    await api.chat()
    assert log.getvalue() == ""

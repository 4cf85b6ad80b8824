"""What an endpoint makes of its URL, headers and fields, and what it never repeats."""

from __future__ import annotations

import asyncio

import pytest
from scripted_server import Scripted

from penstock.errors import ConfigError
from penstock.measure.load.connection import Timeouts
from penstock.measure.load.dialects import DIALECTS, USUAL
from penstock.measure.load.endpoint import Endpoint, address_of
from penstock.measure.load.http import Client
from penstock.measure.load.target import Ask
from penstock.measure.records import Clock, Request


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://api.perplexity.ai/chat/completions", ""),
        ("https://a/openai/deployments/d/chat/completions?api-version=1", "/openai/deployments/d"),
        ("https://a/v1/completions", "/v1"),
    ],
)
def test_a_route_that_is_named_in_full_is_where_it_is(url: str, base: str) -> None:
    assert address_of(url).base == base


def test_no_part_of_a_secret_is_repeated() -> None:
    target = Endpoint(
        "http://a/v1?key=in-the-query&api-version=2024-10-21",
        model="m",
        api_key="of-the-user",
        headers={"X-Auth": "Scheme of-the-gateway", "X-Short": "a"},
    )
    for secret in ("in-the-query", "of-the-user", "of-the-gateway"):
        assert target.redact(f"wrong key {secret}, or a") == "wrong key ***, or a"
    assert target.redact("since 2024-10-21") == "since 2024-10-21"
    assert "in-the-query" not in target.arm.target


def test_an_empty_key_is_none() -> None:
    target = Endpoint("http://a", model="m", api_key="")
    assert target.redact("told") == "told"
    assert b"Authorization" not in target.client.head("GET", "/", target._headers)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://a.example/v1", b"a.example"),
        ("http://a.example:80", b"a.example"),
        ("https://a.example:80", b"a.example:80"),
        ("http://[::1]:8000", b"[::1]:8000"),
    ],
)
def test_the_port_that_goes_unsaid(url: str, host: bytes) -> None:
    assert b"\r\nHost: " + host + b"\r\n" in Client(url).head("GET", "/")


def test_a_path_that_would_break_the_request() -> None:
    with pytest.raises(ConfigError, match="The path of the URL holds a space"):
        Endpoint("http://a/my model/v1", model="m")


def test_connecting_takes_no_longer_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect() -> None:
        client = Client("http://a", timeouts=Timeouts(connect_s=30.0, total_s=0.01))
        monkeypatch.setattr(client, "_dial", lambda: asyncio.sleep(30))
        await client._connect(None)  # type: ignore[arg-type]

    with pytest.raises(Exception, match=r"No connection within `0\.01` s"):
        asyncio.run(connect())


def test_no_half_of_a_secret_is_left_where_a_message_is_cut() -> None:
    target, row = Endpoint("http://a", model="m", api_key="of-the-user"), Request()
    target._fail(row, "server", "x" * 395 + "of-the-user")
    assert row.error == "x" * 395 + "***"
    target._fail(row, "server", "x" * 5000)
    assert row.error == "x" * 400


def test_fields_of_the_user_win_over_ours() -> None:
    ask = Ask(prompt_id="p", prompt="a", max_tokens=8, extra={"max_tokens": 3, "top_k": 1})
    body = DIALECTS["openai-chat"].body(ask, "m", USUAL)
    assert (body["max_tokens"], body["top_k"], body["model"]) == (3, 1, "m")


@pytest.mark.anyio
async def test_the_end_of_a_retried_request_is_that_of_the_last_attempt(
    scripted_server: Scripted,
) -> None:
    scripted_server.configure(fail={"status": 429, "retry_after_s": 0, "first": 1}, hang_at=0)
    target = Endpoint(scripted_server.url, model="scripted", probe=False, retries=1, timeout_s=0.2)
    row = Request()
    assert await target.ask(Ask(prompt_id="p", prompt="a", max_tokens=2), row, Clock()) is None
    await target.close()
    assert (row.error_class, row.retries) == ("timeout", 1)
    assert row.t_sent_ns is not None
    assert row.t_done_ns is not None
    assert row.t_done_ns - row.t_sent_ns >= 0.2e9

"""Keys, hosts, sizes, depth, types: what is refused before anything reads its meaning."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import FakeClient, Harness, Site, error_of, run_site, until

from penstock.errors import ConfigError
from penstock.server.settings import ServerSettings

pytestmark = pytest.mark.anyio

Make = Callable[..., Harness]
BODY = json.dumps({"prompt": "Hi"}).encode()
JSON = {"content-type": "application/json"}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]


async def test_every_route_needs_the_key(make_api: Make) -> None:
    """Every path and method, also those that do not exist, but for two."""
    api = make_api(api_key=("s3cret",))
    odd = ["/", "/nothing", "/health/", "//health", "/HEALTH", "/v1/../health", "/ready?x=1#"]
    for path in [*api.paths, *odd]:
        for method in METHODS:
            response = await api.http.request(method, path)
            is_open = response.url.path in ("/health", "/ready") and method in ("GET", "HEAD")
            assert response.status_code == (200 if is_open else 401), (method, path)
    assert not api.engine.requests


async def test_a_refusal_has_openais_form(make_api: Make) -> None:
    api = make_api(api_key=("s3cret",))
    response = await api.chat()
    error = error_of(response)
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert response.headers["www-authenticate"] == "Bearer"
    assert "s3cret" not in response.text


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic s3cret",
        "s3cret",
        "Bearer s3cret2",
        "Bearer s3cre",
        "Bearer s3cret s3cret",
        "Bearer " + "x" * 5000,
        "Bearer s3cr\u00e9t",
    ],
)
async def test_wrong_keys(make_api: Make, header: str) -> None:
    api = make_api(api_key=("s3cret",))
    response = await api.http.get("/v1/models", headers={b"authorization": header.encode()})
    assert response.status_code == 401


async def test_right_keys(make_api: Make, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\nfrom-file\n\n")
    api = make_api(api_key=("one", "two"), api_key_file=str(file))
    for key in ("one", "two", "from-file"):
        for scheme in ("Bearer", "bearer", "BEARER"):
            headers = {"authorization": f"{scheme} {key}"}
            assert (await api.http.get("/v1/models", headers=headers)).status_code == 200
    twice = [("authorization", "Bearer one"), ("authorization", "Bearer one")]
    assert (await api.http.get("/v1/models", headers=twice)).status_code == 401


def test_bad_keys_are_told_at_the_start(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for options in (
        {"api_key_file": str(tmp_path / "missing")},
        {"api_key_file": str(empty)},
        {"api_key": ("",)},
        {"api_key": ("a b",)},
        {"api_key": ("x" * 600,)},
    ):
        with pytest.raises(ConfigError):
            ServerSettings(**options).keys()
    assert "s3cret" not in repr(ServerSettings(api_key=("s3cret",)))


@pytest.mark.parametrize(
    "options",
    [
        {"port": 70_000},
        {"max_body_bytes": 0},
        {"max_queue": -1},
        {"request_timeout_s": 0},
        {"log_level": "loud"},
        {"ssl_keyfile": "k"},
        {"host": "0.0.0.0"},
        {"host": "llm.example"},
    ],
)
def test_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerSettings(**options)


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerSettings(host=host).is_loopback


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io"])
async def test_foreign_hosts(api: Harness, host: str) -> None:
    """A page that resolves its own name to 127.0.0.1 must not reach the server."""
    response = await api.http.get("/v1/models", headers={"host": host})
    assert response.status_code == 400
    assert error_of(response)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
async def test_own_hosts(api: Harness, host: str) -> None:
    assert (await api.http.get("/v1/models", headers={"host": host})).status_code == 200


async def test_hosts_can_be_set(make_api: Make) -> None:
    open_api = make_api(host="0.0.0.0", allow_anonymous=True)
    assert (await open_api.http.get("/health", headers={"host": "any"})).status_code == 200
    api = make_api(host="0.0.0.0", api_key=("k",), allowed_hosts=("llm.example",))
    assert (await api.http.get("/health", headers={"host": "llm.example"})).status_code == 200
    assert (await api.http.get("/health", headers={"host": "any"})).status_code == 400


async def test_large_heads(make_api: Make) -> None:
    api = make_api(max_header_bytes=500)
    response = await api.http.get("/health", headers={"x": "y" * 500})
    assert response.status_code == 431
    assert error_of(response)["code"] == "headers_too_large"
    assert (await api.http.get("/health?" + "q" * 500)).status_code == 431


async def test_large_bodies(make_api: Make) -> None:
    """Told by the length it says, and by the length it has."""
    api = make_api(max_body_bytes=100)
    response = await api.http.post("/v1/completions", content=b"x" * 101, headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert response.headers["connection"] == "close"

    async def pieces() -> Any:
        for _ in range(20):
            yield b"x" * 10

    response = await api.http.post("/v1/completions", content=pieces(), headers=JSON)
    assert response.status_code == 413


async def test_compressed_bodies(api: Harness) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    response = await api.http.post("/v1/completions", content=gzip.compress(BODY), headers=headers)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_encoding"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_only_json(api: Harness, kind: str) -> None:
    """What a form on a foreign page can post without asking is refused."""
    headers = {"content-type": kind} if kind else {}
    response = await api.http.post("/v1/completions", content=BODY, headers=headers)
    assert response.status_code == 415
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await api.http.post("/v1/completions", content=BODY, headers=headers)).is_success


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a"} x',
        b"[" * 100_000,
        b'{"prompt": "a", "logit_bias": ' + b'{"1": ' * 50_000 + b"}" * 50_001,
        b'{"prompt": "a", "suffix": ' + b"[" * 40 + b"]" * 40 + b"}",
    ],
)
async def test_what_is_not_a_request(api: Harness, body: bytes) -> None:
    response = await api.http.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] in ("body", "prompt")
    assert (await api.complete()).status_code == 200  # the server is well


async def test_no_cors(api: Harness) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    response = await api.http.options("/v1/completions", headers=headers)
    assert response.status_code == 405
    response = await api.http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in response.headers)


async def test_request_ids(api: Harness) -> None:
    response = await api.http.get("/health", headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    for bad in (b"a b", b"x" * 200, "é".encode()):
        response = await api.http.get("/health", headers={b"x-request-id": bad})
        assert len(response.headers["x-request-id"]) == 32
    response = await api.http.get("/nothing", headers={"x-request-id": "abc-2"})
    assert error_of(response)["request_id"] == "abc-2"


async def test_internal_errors_tell_nothing(api: Harness) -> None:
    api.engine.error = RuntimeError("canary at 0x7f")
    response = await api.chat()
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "canary" not in response.text


async def _talk(site: Site, data: bytes, *, wait_s: float = 2.0) -> bytes:
    """Send bytes, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        writer.write(data)
        async with asyncio.timeout(wait_s):
            return await reader.read()
    finally:
        writer.close()


async def test_a_head_that_does_not_end() -> None:
    """Refused while it comes: nothing of it is kept."""
    async with run_site(FakeClient(), ServerSettings(max_header_bytes=1000)) as site:
        for head in (b"GET / HTTP/1.1\r\nx: " + b"y" * 5000, b"GET /" + b"y" * 5000):
            assert (await _talk(site, head)).startswith(b"HTTP/1.1 431 ")


async def test_a_head_that_does_not_come() -> None:
    async with run_site(FakeClient(), ServerSettings(header_timeout_s=0.05)) as site:
        for head in (b"", b"GET / HTTP/1.1\r\nx:"):
            with contextlib.suppress(ConnectionResetError):
                assert await _talk(site, head) == b""


async def test_a_body_that_does_not_come() -> None:
    async with run_site(FakeClient(), ServerSettings(body_timeout_s=0.05)) as site:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        head += b"content-type: application/json\r\ncontent-length: 10\r\n\r\n{"
        assert (await _talk(site, head)).startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_stops_after_the_answer() -> None:
    """An open route answers before the body is there; the connection does not wait for the rest."""
    async with run_site(FakeClient(), ServerSettings(api_key=("k",))) as site:
        for rest in (b"content-length: 1000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n5\r\n"):
            head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + rest
            assert (await _talk(site, head)).startswith(b"HTTP/1.1 200 ")


async def test_bytes_that_begin_no_request() -> None:
    """They stop uvicorn's timer of idle connections; ours ends them."""
    async with run_site(FakeClient(), ServerSettings(header_timeout_s=0.1)) as site:
        health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
        upgrade = b"connection: upgrade\r\nupgrade: h2c\r\n"
        for first, then in ((health, b"\r\n"), (health + upgrade, health)):
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(first + b"\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
            writer.write(then)
            async with asyncio.timeout(4):  # uvicorn's own is 5 s
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            writer.close()


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED += b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"0\r\nx: 1\r\ny: 2\r\n", 400),
        (b"0\r\n" + b"x" * 5000, 431),
        (b"0\r\nx: " + b"y" * 5000, 431),
        (b"1;x=" + b"y" * 5000, 431),
    ],
)
async def test_what_follows_a_body_without_an_end(rest: bytes, status: int) -> None:
    settings = ServerSettings(max_header_bytes=1000)
    async with run_site(FakeClient(), settings) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        for data in (CHUNKED, b"2\r\n{}\r\n", rest):
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 %d " % status)
        writer.close()


async def test_a_long_body_is_no_framing(api: Harness) -> None:
    """Only bytes without a body count."""
    async with run_site(FakeClient(), ServerSettings(max_header_bytes=1000)) as site:
        body = json.dumps({"prompt": "x" * 100}).encode() + b" " * 300_000
        chunks = b"".join(
            b"%x\r\n%s\r\n" % (len(body[i : i + 99]), body[i : i + 99])
            for i in range(0, len(body), 99)
        )
        rest = b"0\r\n\r\n"
        head = CHUNKED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        assert (await _talk(site, head + chunks + rest, wait_s=10)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "more",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nx: " + b"y" * 20_000,
        b"garbage\r\n\r\n",
    ],
)
async def test_what_comes_in_the_middle_of_an_answer(more: bytes) -> None:
    """The answer is whole and the last; and a client that leaves is noticed."""
    engine = FakeClient()
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with run_site(engine, ServerSettings()) as site:
        for leaves in (False, True):
            engine.hold_after = 2
            engine.go.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(head + body)
            received = await reader.readuntil(b'"content":"H"')
            for _ in range(3):
                writer.write(more)
                await writer.drain()
                await asyncio.sleep(0.02)
            assert len(engine.live) == 1
            if leaves:
                writer.close()
                await until(lambda: not engine.live)
                continue
            engine.go.set()
            async with asyncio.timeout(5):
                received += await reader.read()
            assert received.count(b"HTTP/1.1 ") == 1
            assert b"[DONE]\n\n\r\n0\r\n\r\n" in received
            writer.close()


async def test_all_bodies_together(make_api: Make) -> None:
    """A budget over the bodies of the open requests; one alone always passes."""
    engine = FakeClient()
    engine.hold_after = 0
    api = make_api(engine, max_bodies_bytes=1000)
    first = asyncio.create_task(api.complete("x" * 100, user="y" * 1500))
    await until(lambda: len(engine.requests) == 1)
    response = await api.complete("x")
    assert (response.status_code, error_of(response)["code"]) == (429, "too_many_bodies")
    assert "retry-after" in response.headers
    engine.go.set()
    assert (await first).status_code == 200
    assert (await api.complete("x" * 100, user="y" * 1500)).status_code == 200


@pytest.mark.parametrize("name", ["request_timeout_s", "body_timeout_s", "drain_timeout_s"])
def test_times_are_finite_numbers(name: str) -> None:
    for value in (math.nan, math.inf, -1.0):
        settings: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=name):
            ServerSettings(**settings)


async def test_too_many_connections() -> None:
    async with run_site(FakeClient(), ServerSettings(max_connections=1)) as site:
        _, first = await asyncio.open_connection("127.0.0.1", site.port)
        assert (await _talk(site, b"")).startswith(b"HTTP/1.1 503 ")
        first.close()
        await first.wait_closed()
        async with httpx.AsyncClient() as http, asyncio.timeout(5):
            while (await http.get(site.url + "/health")).status_code != 200:
                pass

"""The HTTP client: bodies of every kind, kept connections, limits, times, and when it gives up."""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from penstock.errors import ConfigError
from penstock.measure.load.connection import (
    Exchange,
    Failure,
    HttpError,
    Limits,
    Timeouts,
)
from penstock.measure.load.http import Client, origin_of

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;name=value\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"
)
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhello"
HANG = b""  # nothing, and the connection stays
CLOSE = b"\0close"


class Got(NamedTuple):
    exchange: Exchange
    body: bytes


class Server:
    """Gives prepared answers, whatever is asked; `CLOSE` within one closes the connection."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.url = ""
        self.connections: list[int] = []  # requests on each
        self.requests: list[bytes] = []
        self.num_gone = 0  # connections that the client closed

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.connections)
        self.connections.append(0)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                self.requests.append(head + await reader.readexactly(length))
                self.connections[number] += 1
                answer, close, _ = self.answers.pop(0).partition(CLOSE)
                writer.write(answer)
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_gone += 1
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    *answers: bytes, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    server = Server(list(answers))
    listener = await asyncio.start_server(server.serve, host, 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    server.url = f"http{'s' if tls else ''}://{shown}:{port}"
    try:
        yield server
    finally:
        listener.close()
        await asyncio.sleep(0.01)  # handlers see that their clients are gone


async def send(client: Client, body: bytes = b"") -> Got:
    pieces: list[bytes] = []
    exchange = Exchange(lambda _, __, piece: pieces.append(piece))
    await client.send(exchange, client.head("POST", "/x"), body)
    return Got(exchange, b"".join(pieces))


async def fails(client: Client) -> tuple[Failure, str]:
    with pytest.raises(HttpError) as caught:
        await send(client)
    return caught.value.failure, str(caught.value)


@pytest.mark.parametrize(
    "answer", [OK, CHUNKED, UNTIL_CLOSE + CLOSE], ids=["length", "chunked", "close"]
)
async def test_a_body_of_each_kind(answer: bytes) -> None:
    async with serving(answer) as server:
        client = Client(server.url)
        before_ns = time.perf_counter_ns()
        exchange, body = await send(client, b"asked")
        await client.close()
    assert (exchange.status, body) == (200, b"hello")
    assert server.requests[0].endswith(b"Content-Length: 5\r\n\r\nasked")
    assert exchange.t_sent_ns is not None
    assert exchange.t_head_ns is not None
    assert exchange.t_done_ns is not None
    assert before_ns < exchange.t_sent_ns < exchange.t_head_ns <= exchange.t_done_ns
    assert exchange.t_done_ns < time.perf_counter_ns()
    assert exchange.connect_s is not None


async def test_interim_answers_are_not_the_answer() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with serving(interim + OK) as server:
        client = Client(server.url)
        exchange, body = await send(client)
        await client.close()
    assert (exchange.status, body) == (200, b"hello")
    assert exchange.headers == {"content-length": "5"}


async def test_a_status_without_a_body() -> None:
    async with serving(b"HTTP/1.1 204 No Content\r\n\r\n", OK) as server:
        client = Client(server.url)
        assert (await send(client)).exchange.status == 204
        assert (await send(client)).body == b"hello"
        await client.close()
    assert server.connections == [2]


async def test_connections_are_kept() -> None:
    async with serving(OK, CHUNKED, OK) as server:
        client = Client(server.url)
        connects = [(await send(client)).exchange.connect_s for _ in range(3)]
        await client.close()
    assert server.connections == [3]
    assert connects[0] is not None
    assert connects[1:] == [None, None]


@pytest.mark.parametrize(
    "first",
    [
        OK.replace(b"200 OK\r\n", b"200 OK\r\nConnection: close\r\n"),
        OK.replace(b"1.1", b"1.0"),
        OK + OK,
    ],
    ids=["says close", "HTTP/1.0", "more than was asked for"],
)
async def test_connections_that_are_not_kept(first: bytes) -> None:
    async with serving(first, OK) as server:
        client = Client(server.url)
        assert (await send(client)).body == b"hello"
        assert (await send(client)).body == b"hello"
        await client.close()
    assert server.connections == [1, 1]


async def test_requests_at_once_have_connections_of_their_own() -> None:
    async with serving(*[OK] * 9) as server:
        client = Client(server.url)
        await asyncio.gather(*(send(client) for _ in range(3)))
        await asyncio.gather(*(send(client) for _ in range(3)))
        assert server.connections == [2, 2, 2]
        for _ in range(3):
            await send(client)
        assert sorted(server.connections) == [2, 2, 5]  # the last one used comes first
        await client.close()


async def test_places_bound_what_runs_at_once() -> None:
    async with serving(*[OK] * 6) as server:
        client = Client(server.url, max_connections=2)
        await asyncio.gather(*(send(client) for _ in range(6)))
        await client.close()
    assert len(server.connections) == 2


async def test_a_stale_connection_is_replaced_once() -> None:
    async with serving(OK, CLOSE, OK) as server:
        client = Client(server.url)
        await send(client)
        exchange, body = await send(client)
        await client.close()
    assert body == b"hello"
    assert exchange.resent
    assert exchange.connect_s is not None
    assert server.connections == [2, 1]


async def test_nothing_is_sent_twice_once_a_byte_came() -> None:
    async with serving(OK, b"H" + CLOSE, OK) as server:
        client = Client(server.url)
        await send(client)
        failure, message = await fails(client)
        await client.close()
    assert (failure, message) == (
        Failure.PROTOCOL,
        "The answer broke off after `0` bytes of its body.",
    )
    assert len(server.requests) == 2


async def test_a_fresh_connection_that_closes() -> None:
    async with serving(CLOSE, CLOSE) as server:
        client = Client(server.url)
        failure, message = await fails(client)
        await client.close()
    assert failure is Failure.CONNECT
    assert message == "The server closed the connection without an answer."
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello" + CLOSE, "broke off after `5` bytes"),
        (CHUNKED[:-20] + CLOSE, "broke off"),
        (b"SSH-2.0-OpenSSH_9\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "not HTTP/1.1"),
        (OK.replace(b"\r\n", b"\r\nContent-Encoding: br\r\n", 1), "compressed (`br`)"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 5000 + b"\r\n\r\n", "more than `1000` bytes"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 5000, "more than `1000` bytes"),
        (b"HTTP/1.1 100 X\r\n\r\n" * 100, "more than `1000` bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000, "more than `2000`"),
    ],
)
async def test_what_is_no_answer(answer: bytes, says: str) -> None:
    async with serving(answer) as server:
        client = Client(server.url, limits=Limits(header_bytes=1000, body_bytes=2000))
        failure, message = await fails(client)
        await asyncio.sleep(0)
        assert not client._open, "the connection is of no use"
        await client.close()
    assert failure is Failure.PROTOCOL
    assert says in message


@pytest.mark.parametrize(
    ("answer", "timeouts", "says"),
    [
        (HANG, Timeouts(first_byte_s=0.05), "No answer within `0.05` s."),
        (
            OK[:-2],
            Timeouts(first_byte_s=0.01, idle_s=0.05),
            "No more of the answer within `0.05` s.",
        ),
        (OK[:-2], Timeouts(total_s=0.05), "No whole answer within `0.05` s."),
    ],
)
async def test_timeouts(answer: bytes, timeouts: Timeouts, says: str) -> None:
    async with serving(answer) as server:
        client = Client(server.url, timeouts=timeouts)
        begin_s = time.perf_counter()
        assert await fails(client) == (Failure.TIMEOUT, says)
        assert time.perf_counter() - begin_s >= 0.05
        await client.close()


async def test_no_connection_in_time() -> None:
    """A port that takes connections and does not speak TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(
            f"https://127.0.0.1:{listener.getsockname()[1]}", timeouts=Timeouts(connect_s=0.05)
        )
        assert await fails(client) == (Failure.TIMEOUT, "No connection within `0.05` s.")
        await client.close()


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    failure, message = await fails(client)
    assert failure is Failure.CONNECT
    assert message.startswith(f"`127.0.0.1:{port}` cannot be reached: Connect")
    client = Client("http://no-such-host.invalid")
    failure, message = await fails(client)
    assert failure is Failure.CONNECT
    assert message.startswith("`no-such-host.invalid` is not known: ")


async def test_who_is_cancelled_closes_the_connection() -> None:
    async with serving(HANG, OK) as server:
        client = Client(server.url)
        asking = asyncio.create_task(send(client))
        while not server.requests:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await send(client)).body == b"hello"
        await client.close()
    assert server.connections == [1, 1]
    assert server.num_gone == 2


async def test_a_connection_that_is_closing_is_not_used() -> None:
    async with serving(OK, OK) as server:
        client = Client(server.url)
        await send(client)
        next(iter(client._idle)).transport.close()
        exchange, body = await send(client)
        await client.close()
    assert (body, exchange.resent) == (b"hello", False)


async def test_a_request_that_is_sent_again_keeps_its_first_time() -> None:
    async with serving(OK, OK) as server:
        client, exchange = Client(server.url), Exchange(lambda *_: None)
        exchange.t_sent_ns = 7
        await client.send(exchange, client.head("POST", "/x"))
        await client.close()
    assert exchange.t_sent_ns == 7


async def test_an_address_that_fails_is_looked_up_again() -> None:
    async with serving(OK) as server:
        client = Client(server.url)
        client._addresses = ["127.0.0.2"]
        client._resolved_s = asyncio.get_running_loop().time()
        assert (await fails(client))[0] is Failure.CONNECT
        assert (await send(client)).body == b"hello"
        await client.close()


async def test_hundreds_that_are_cancelled_leave_nothing() -> None:
    async with serving(*[HANG] * 300) as server:
        client = Client(server.url, max_connections=100)
        tasks = [asyncio.create_task(send(client)) for _ in range(300)]
        for delay_s in (0.0, 0.001, 0.02):  # while connecting, sending, waiting
            await asyncio.sleep(delay_s)
            for task in tasks[::3] if delay_s == 0.0 else tasks[1::3] if delay_s < 0.01 else tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert all(task.cancelled() for task in tasks)
        assert not client._open
        assert not client._idle
        assert client._places is not None
        assert client._places._value == 100
        await client.close()


async def test_what_a_reader_raises_comes_out() -> None:
    class Mine(Exception):
        pass

    def raising(exchange: Exchange, t_ns: int, piece: bytes) -> None:
        raise Mine

    async with serving(OK, OK) as server:
        client = Client(server.url)
        with pytest.raises(Mine):
            await client.send(Exchange(raising), client.head("GET", "/"))
        assert (await send(client)).body == b"hello"
        await client.close()
    assert server.connections == [1, 1]


async def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on loopback")
    async with serving(OK, host="::1") as server:
        client = Client(server.url)
        assert (await send(client)).body == b"hello"
        await client.close()
    assert f"Host: {server.url.removeprefix('http://')}\r\n".encode() in server.requests[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that signs itself, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    keys = ["-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run(["openssl", *made.split(), *names, *keys], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


async def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with serving(OK, OK, tls=tls) as server:
        stranger = Client(server.url)
        failure, message = await fails(stranger)
        assert failure is Failure.CONNECT
        assert "its certificate is not trusted (self-signed certificate)" in message
        await stranger.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        client = Client(server.url.replace("127.0.0.1", "localhost"))
        assert (await send(client)).body == b"hello"
        assert (await send(client)).exchange.connect_s is None
        await client.close()
        wrong_name = Client(server.url)
        assert "its certificate is not trusted (IP address mismatch" in (await fails(wrong_name))[1]
        await wrong_name.close()


@pytest.mark.parametrize(
    ("url", "is_what"),
    [
        ("http://a", (False, "a", 80)),
        ("https://a/v1", (True, "a", 443)),
        ("http://[::1]:8000/v1", (False, "::1", 8000)),
        ("HTTP://A.example:1", (False, "a.example", 1)),
    ],
)
def test_origins(url: str, is_what: tuple[bool, str, int]) -> None:
    assert origin_of(url) == is_what


@pytest.mark.parametrize(
    "url", ["a:80", "ftp://a", "http://", "http://a:99999", "http://[::1", "/v1"]
)
def test_what_is_no_origin(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        origin_of(url)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        origin_of("http://me:hunter2@a")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "headers", [{"A": "hunter2\r\nC: d"}, {"A\n": "hunter2"}, {"A": "\0"}, {"A": "\u20ac"}]
)
def test_headers_that_cannot_be_sent(headers: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Client("http://a").head("GET", "/", headers)
    assert all(value not in str(caught.value) for value in headers.values())


async def test_an_exchange_leaves_no_garbage() -> None:
    """Nothing has to be collected, so that collecting can be put off while it is measured."""
    async with serving(*[CHUNKED] * 12) as server:
        client = Client(server.url)
        for _ in range(2):
            await send(client)
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await send(client)
            assert gc.collect() == 0
        finally:
            gc.enable()
        await client.close()

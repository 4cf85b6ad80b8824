"""A connection without a socket: however bytes are cut, and when the clock is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.measure.load.connection import (
    Connection,
    Exchange,
    HttpError,
    Limits,
    Pump,
    Stale,
    Timeouts,
)

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;name=value\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"
)


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.is_closed = False

    def write(self, data: object) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close


class Owner:
    """A client that keeps nothing."""

    timeouts, limits = Timeouts(total_s=10.0), Limits()

    def made(self, connection: Connection) -> None:
        pass

    keep = lost = made


async def _fed(pieces: list[bytes], on_body: Callable[[Exchange, int, bytes], None]) -> Exchange:
    """An exchange on a connection without a socket, which reads these pieces."""
    connection, exchange = Connection(Owner(), Pump()), Exchange(on_body)
    connection.connection_made(FakeTransport())
    task = asyncio.create_task(connection.exchange(exchange, b"", time.perf_counter_ns()))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    await task
    return exchange


@settings(max_examples=60)
@given(cuts=st.sets(st.integers(1, len(CHUNKED) - 1)), answer=st.sampled_from([OK, CHUNKED]))
def test_however_the_bytes_are_cut(cuts: set[int], answer: bytes) -> None:
    ends = [*sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
    pieces = [answer[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    body: list[bytes] = []
    exchange = asyncio.run(_fed(pieces, lambda _, __, piece: body.append(piece)))
    assert (exchange.status, b"".join(body), exchange.num_bytes) == (200, b"hello", 5)


async def test_a_piece_has_the_time_of_its_reading_not_of_its_parsing() -> None:
    """Reads of the same turn of the loop have their times before the first is parsed."""
    parts = [b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n", *[b"x"] * 40]
    times_ns: list[int] = []
    parsed_ns: list[int] = []

    def slow(exchange: Exchange, t_ns: int, piece: bytes) -> None:
        times_ns.append(t_ns)
        parsed_ns.append(time.perf_counter_ns())
        time.sleep(0.001)

    await _fed(parts, slow)
    assert len(times_ns) == 40
    assert times_ns == sorted(times_ns)
    assert times_ns[-1] < parsed_ns[0]


async def test_reading_goes_between_slices_of_parsing() -> None:
    """What is read while others are parsed does not wait for all of them."""
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(count)

    def slow(exchange: Exchange, t_ns: int, piece: bytes) -> None:
        time.sleep(0.0005)  # more than a slice

    asyncio.get_running_loop().call_soon(count)
    await _fed([b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n", *[b"x"] * 20], slow)
    assert turns >= 20


@pytest.mark.parametrize(
    ("begin", "piece"),
    [(b"0\r\nX: ", b"x"), (b"0\r\n", b"X: x\r\n"), (b"5;x=", b"x")],
    ids=["a trailer without an end", "trailers without an end", "a chunk's extension"],
)
async def test_what_stands_beside_the_body_is_limited(begin: bytes, piece: bytes) -> None:
    """The parser keeps it, or skips it, without a word."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    many = [piece * 1000] * (2 * Limits().header_bytes // 1000)
    with pytest.raises(HttpError, match="The head of the answer has more than"):
        await _fed([head, begin, *many], lambda *_: None)


async def test_small_pieces_are_no_long_head() -> None:
    """What is limited is what comes without a piece of the body, not all framing together."""
    chunks = [b"1;a=b\r\nx\r\n"] * 20_000
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    exchange = await _fed([head, *chunks, b"0\r\n\r\n"], lambda *_: None)
    assert exchange.num_bytes == 20_000


async def test_a_trailer_does_not_change_the_head() -> None:
    head = b"HTTP/1.1 200 OK\r\nX: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    exchange = await _fed([head, b"1\r\nx\r\n0\r\nX: b\r\nY: c\r\n\r\n"], lambda *_: None)
    assert exchange.headers == {"x": "a", "transfer-encoding": "chunked"}


async def test_what_was_said_before_the_question_is_no_answer() -> None:
    """Proxies say 408 to a connection that was idle, and close it."""
    connection, exchange = Connection(Owner(), Pump()), Exchange(lambda *_: None)
    connection.connection_made(FakeTransport())
    task = asyncio.create_task(connection.exchange(exchange, b"", time.perf_counter_ns()))
    connection.data_received(b"HTTP/1.1 408 Request Time-out\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(Stale):
        await task
    assert (exchange.status, connection.transport.is_closing()) == (0, True)


async def test_a_body_of_no_known_coding_ends_with_the_connection() -> None:
    connection, exchange = Connection(Owner(), Pump()), Exchange(lambda *_: None)
    connection.connection_made(FakeTransport())
    task = asyncio.create_task(connection.exchange(exchange, b"", time.perf_counter_ns()))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhello")
    connection.connection_lost(None)
    await task
    assert (exchange.num_bytes, exchange.t_done_ns is not None) == (5, True)

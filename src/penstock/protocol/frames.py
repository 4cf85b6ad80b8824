"""Messages on a stream of bytes between two processes of ours: length-prefixed msgpack.

Owns the framing and how a child takes up its end (`protocol.child` is the other), not what the
messages are. Never pickle: what arrives is data.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
from collections.abc import Iterator
from typing import TypeVar

import msgspec

_LENGTH = struct.Struct("<I")
_First = TypeVar("_First")
_encoder = msgspec.msgpack.Encoder()


def frame(message: object) -> bytes:
    """A message as it goes over the socket: its length, then msgpack."""
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into messages, however it arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; give the messages that are complete now."""
        buffer, start, messages = self._buffer, 0, []
        buffer += data
        while len(buffer) - start >= _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + _LENGTH.unpack_from(buffer, start)[0]
            if len(buffer) < end:
                break
            messages.append(bytes(buffer[begin:end]))
            start = end
        del buffer[:start]
        return messages


def _messages_of(connection: socket.socket) -> Iterator[bytes]:
    """The messages that arrive, until the other side is gone."""
    frames = Frames()
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            yield from frames.feed(data)


def begin(fd: int, kind: type[_First]) -> tuple[socket.socket, Iterator[bytes], _First] | None:
    """In a process of ours: its socket, the messages on it, and the first of them; None: none came.

    Signals that end a server are ignored from now on: the parent drains first, and closes the
    socket then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    messages = _messages_of(connection)
    first = next(messages, None)
    if first is None:
        return None
    return connection, messages, msgspec.msgpack.decode(first, type=kind)

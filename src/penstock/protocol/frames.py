"""Messages on a stream of bytes between two processes of ours: length-prefixed msgpack.

Owns the framing, not what the messages are. Never pickle: what arrives is data.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import msgspec

_LENGTH = struct.Struct("<I")
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


def messages_of(connection: socket.socket) -> Iterator[bytes]:
    """The messages that arrive, until the other side is gone."""
    frames = Frames()
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            yield from frames.feed(data)

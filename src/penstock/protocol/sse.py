"""Server-sent events: framing and parsing, as the WHATWG HTML standard (section 9.2) has them.

Knows bytes and lines, not what an event means. `Decoder` gives the same events however the bytes
are cut into pieces, also in the middle of a UTF-8 character or of a CR LF.
"""

from __future__ import annotations

from typing import NamedTuple

DONE = b"data: [DONE]\n\n"
DONE_DATA = "[DONE]"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients skip it, proxies see that we live


def encode(data: bytes) -> bytes:
    """One event. `data` holds no line break, as JSON from msgspec never does."""
    return b"data: " + data + b"\n\n"


class Event(NamedTuple):
    """What one block of lines said."""

    data: str
    event: str = "message"
    id: str | None = None


class EventTooLong(ValueError):
    """The peer sends an event that does not end."""


class Decoder:
    """Turns pieces of a byte stream into events. An event without its empty line is not given.

    Args:
        max_event_bytes: the most that one unfinished event may hold.
    """

    def __init__(self, max_event_bytes: int = 16 * 2**20) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._at_start = True
        self._data: list[str] = []
        self._num_bytes = 0  # of the event so far
        self._event = ""
        self._id: str | None = None

    def push(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes.

        Raises:
            EventTooLong: more than `max_event_bytes` came without an end.
        """
        text = self._rest + piece
        self._rest = b""
        if self._at_start and text:
            if len(text) < 3 and b"\xef\xbb\xbf".startswith(text):
                self._rest = text  # perhaps a byte order mark
                return []
            text = text.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if text.endswith(b"\r"):  # perhaps half of a CR LF
            text, held = text[:-1], b"\r"
        else:
            held = b""
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        events = [event for line in lines if (event := self._line(line)) is not None]
        if self._num_bytes + len(self._rest) > self._max_event_bytes:
            raise EventTooLong(f"An event has more than `{self._max_event_bytes}` bytes.")
        return events

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        self._num_bytes += len(line)
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Event | None:
        data, event = self._data, self._event
        self._data, self._event, self._num_bytes = [], "", 0
        return Event("\n".join(data), event or "message", self._id) if data else None

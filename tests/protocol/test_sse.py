"""Server-sent events: what is encoded is decoded, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.protocol import sse


@given(
    data=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), max_size=5),
    cuts=st.lists(st.integers(0, 400), max_size=10),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    bom=st.booleans(),
)
def test_round_trip(data: list[str], cuts: list[int], newline: bytes, bom: bool) -> None:
    stream = b"".join(sse.encode(text.encode()) for text in data) + sse.KEEP_ALIVE + sse.DONE
    stream = (b"\xef\xbb\xbf" if bom else b"") + stream.replace(b"\n", newline)
    ends = sorted({min(cut, len(stream)) for cut in cuts})
    decoder = sse.Decoder()
    events = []
    for start, end in zip([0, *ends], [*ends, len(stream)], strict=True):
        events += decoder.push(stream[start:end])
    if newline == b"\r":  # its last CR may be half of a CR LF
        events += decoder.push(b"x")
    # A stream of text that begins with a byte order mark of its own loses none of it.
    assert [event.data for event in events] == [*data, "[DONE]"]


def test_fields() -> None:
    """The examples of the standard."""
    events = sse.Decoder().push(
        b": comment\n\ndata: YHOO\ndata: +2\ndata:10\n\n"
        b"event: add\nid: 7\ndata:  x\n\nevent: none\n\ndata\n\nretry: 1\nodd\ndata: y\n\n"
    )
    assert events == [
        sse.Event("YHOO\n+2\n10"),
        sse.Event(" x", "add", "7"),
        sse.Event("", "message", "7"),
        sse.Event("y", "message", "7"),
    ]


def test_an_event_name() -> None:
    assert sse.Decoder().push(b"event: error\ndata: {}\n\n") == [sse.Event("{}", "error")]


def test_what_is_not_ended_is_not_given() -> None:
    decoder = sse.Decoder()
    assert decoder.push(b"data: a\n") == []
    assert decoder.push(b"\n") == [sse.Event("a")]


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 50, b"data: xxxxx\n" * 10])
def test_an_event_without_end(piece: bytes) -> None:
    with pytest.raises(sse.EventTooLong):
        sse.Decoder(max_event_bytes=40).push(piece)

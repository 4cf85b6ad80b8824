"""An answer as it comes in: events out of bytes, and from them the times and counts of its row.

Knows events and rows, not HTTP. However the bytes are cut, the counts are the same. A chunk carries
tokens if it has text, reasoning or a tool call; an empty string or a role does not. Where the
server counts along, what it counted since the last such chunk belongs to the next; and once text
has come, a rise of its count alone is a chunk with tokens too (half of a character, the end).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

from penstock.measure.load.chunks import (
    BadChunk,
    Parse,
    Said,
    ServerError,
    Usage,
    error_of,
    join_logprobs,
)
from penstock.measure.load.target import Reply
from penstock.measure.records import Clock, Request
from penstock.protocol.sse import DONE_DATA, Decoder, Event, EventTooLong

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Answer:
    """Fills in the row of one request while its answer comes in."""

    def __init__(self, row: Request, clock: Clock, parse: Parse) -> None:
        self._row, self._zero_ns, self._parse = row, clock.zero_ns, parse
        self._events, self._utf8 = Decoder(), _UTF8()
        self._is_over = False  # [DONE]
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._num_so_far: int | None = None  # tokens, if the server counts along
        self._num_placed = 0  # of them, in a chunk of the row
        self._counts_along = True
        self._num_reasoning = 0  # in chunks of reasoning
        self._is_all_text = True  # False: a tool call, or another choice, which no reply holds

    def feed(self, t_ns: int, piece: bytes) -> None:
        """A piece of a stream, read at `t_ns` of time.perf_counter_ns().

        Raises:
            BadChunk: it is not what the dialect says.
            ServerError: it says that the server has failed.
        """
        try:
            self._utf8.decode(piece)
            events = self._events.push(piece)
        except UnicodeDecodeError:
            raise BadChunk("The answer is not UTF-8.") from None
        except EventTooLong as error:
            raise BadChunk(str(error)) from None
        for event in events:
            self._event(t_ns - self._zero_ns, event)

    def _event(self, t_ns: int, event: Event) -> None:
        if event.data == DONE_DATA:
            self._is_over = True
        elif event.event == "error":
            raise ServerError(error_of(event.data))
        elif not self._is_over:
            self._chunk(t_ns, self._parse(event.data))

    def _chunk(self, t_ns: int, said: Said) -> None:
        self._keep(said)
        if said.num_new is not None:
            self._num_so_far = (self._num_so_far or 0) + said.num_new
        elif said.usage is not None and said.has_choices:
            self._num_so_far = said.usage.num_out
        elif said.has_content:
            self._counts_along = False
        num_new = (self._num_so_far or 0) - self._num_placed
        row = self._row
        if not said.has_content:
            rose = self._counts_along and said.has_choices and num_new > 0
            if not (rose and row.chunk_t_ns):
                return
        if row.t_first_ns is None:
            row.t_first_ns = t_ns
        if row.t_first_visible_ns is None and said.is_visible:
            row.t_first_visible_ns = t_ns
        row.t_last_ns = t_ns
        row.chunk_t_ns.append(t_ns)
        if self._counts_along:
            row.chunk_n.append(num_new)
            self._num_placed += num_new
            if said.is_reasoning and not said.is_visible:
                self._num_reasoning += num_new

    def _keep(self, said: Said) -> None:
        if said.has_content and not (said.text or said.reasoning):
            self._is_all_text = False
        if said.text:
            self._texts.append(said.text)
        if said.reasoning:
            self._reasonings.append(said.reasoning)
        if said.logprobs is not None:
            self._logprobs.append(said.logprobs)
        self._finish_reason = said.finish_reason or self._finish_reason
        self._usage = said.usage or self._usage

    def whole(self, body: bytes) -> None:
        """The body of an answer that is not streamed: it has no times of tokens.

        Raises:
            BadChunk, ServerError: as `feed`.
        """
        said = self._parse(body)
        if not said.has_choices:
            raise BadChunk("The answer has no choices.")
        self._keep(said)
        self._is_over = True

    def check_end(self) -> None:
        """Raises:
        BadChunk: the stream ended without having said so.
        """
        if self._finish_reason is None and not self._is_over:
            raise BadChunk("The stream ended without `finish_reason` and without `[DONE]`.")

    def count(self, count_tokens: Callable[[str], int] | None) -> None:
        """Write what is known of the counts into the row, also of an answer that broke off."""
        row, usage = self._row, self._usage
        row.n_chunks = len(row.chunk_t_ns)
        row.finish_reason = self._finish_reason
        if not self._counts_along or self._num_so_far is None:
            row.chunk_n.clear()
        if usage is not None:
            row.n_in, row.n_cached, row.n_reasoning = usage.num_in, usage.num_cached, usage[3]
        if row.n_reasoning is None and row.chunk_n and self._reasonings:
            row.n_reasoning = self._num_reasoning
        num_out = self._num_so_far if usage is None or usage.num_out is None else usage.num_out
        text = "".join(self._reasonings + self._texts)
        if num_out is not None:
            row.n_out, row.count_source = num_out, "usage"
        elif count_tokens is not None and self._is_all_text and (text or self._is_over):
            row.n_out, row.count_source = count_tokens(text), "tokenizer"
        elif row.n_chunks:
            row.n_out, row.count_source = row.n_chunks, "chunks"
        if row.chunk_n and row.n_out == sum(row.chunk_n) + 1:
            row.chunk_n[-1] += 1  # the end of the text, which only the last count has
        if row.chunk_n and (row.n_out != sum(row.chunk_n) or min(row.chunk_n) < 0):
            row.chunk_n.clear()  # what it counted along was something else

    def reply(self) -> Reply:
        """What was said."""
        return Reply(
            text="".join(self._texts),
            reasoning="".join(self._reasonings),
            finish_reason=self._finish_reason,
            logprobs=join_logprobs(self._logprobs),
        )

"""What a chunk says, and what an answer makes of a row: recorded shapes of real servers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.measure import metrics
from penstock.measure.load import chunks
from penstock.measure.load.answer import Answer
from penstock.measure.load.chunks import BadChunk, Said, ServerError, Usage
from penstock.measure.load.target import Reply
from penstock.measure.records import Clock, Request

MS = 10**6


def choice(delta: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta or {}, **more}]}


def said(document: dict[str, Any]) -> Said:
    return chunks.openai(json.dumps(document))


@pytest.mark.parametrize(
    ("document", "text", "reasoning", "has_content"),
    [
        (choice({"role": "assistant"}), "", "", False),
        (choice({"role": "assistant", "content": ""}), "", "", False),
        (choice({"content": None}, finish_reason=None), "", "", False),
        (choice({"content": "a"}), "a", "", True),
        (choice({"reasoning_content": "a"}), "", "a", True),
        (choice({"reasoning": "a", "content": ""}), "", "a", True),
        (choice({"refusal": "no"}), "no", "", True),
        (choice({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}), "", "", True),
        (choice({"tool_calls": []}), "", "", False),
        (choice({"function_call": {"name": "f", "arguments": "{"}}), "", "", True),
        (choice({"content": [{"type": "text", "text": "a"}, {"type": "x"}]}), "a", "", True),
        (
            choice(
                {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "b"}]}]}
            ),
            *("", "b", True),
        ),
        (choice({"content": [{"type": "thinking", "thinking": "b"}]}), "", "b", True),
        ({"choices": [{"index": None, "text": "a"}]}, "a", "", True),
        ({"choices": [{"index": 0, "text": "a"}]}, "a", "", True),
        ({"choices": [{"index": 1, "text": "a"}]}, "", "", True),
        ({"choices": [{"message": {"content": "a", "reasoning": "b"}}]}, "a", "b", True),
        ({"choices": [], "prompt_filter_results": [{}]}, "", "", False),
    ],
)
def test_what_is_a_token(
    document: dict[str, Any], text: str, reasoning: str, has_content: bool
) -> None:
    found = said(document)
    assert (found.text, found.reasoning, found.has_content) == (text, reasoning, has_content)


def test_usage() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    assert said({"choices": [], "usage": usage}).usage == Usage(9, 7, 4, 5)
    bare = {"prompt_tokens": 9, "completion_tokens": 7, "prompt_tokens_details": None}
    assert said({"usage": bare}).usage == Usage(9, 7, None, None)
    assert said({"choices": [], "usage": None}).usage is None


def test_reasoning_that_sglang_counts() -> None:
    """Its 0 is also what it says when nobody counted."""
    for told, num_reasoning in ((5, 5), (0, None)):
        usage = {"prompt_tokens": 9, "completion_tokens": 7, "reasoning_tokens": told}
        assert said({"choices": [], "usage": usage}).usage == Usage(9, 7, None, num_reasoning)


def test_tgi() -> None:
    event: dict[str, Any] = {
        "index": 1,
        "token": {"id": 5, "text": " a", "logprob": -1, "special": False},
        "generated_text": None,
        "details": None,
    }
    assert chunks.tgi(json.dumps(event)) == Said(
        text=" a", is_visible=True, has_choices=True, num_new=1
    )
    event["token"] = {"id": 2, "text": "</s>", "special": True}
    event["generated_text"] = " a"
    event["details"] = {"finish_reason": "eos_token", "generated_tokens": 2, "input_length": 3}
    assert chunks.tgi(json.dumps(event)) == Said(
        has_choices=True, num_new=1, usage=Usage(3, 2), finish_reason="eos_token"
    )
    whole = {"generated_text": " a b", "details": {"generated_tokens": 2, "prefill": [{}, {}]}}
    assert chunks.tgi(json.dumps(whole)) == Said(
        text=" a b", is_visible=True, has_choices=True, usage=Usage(2, 2)
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"error": {"message": "dead", "code": 500}}, "dead"),
        ({"error": "dead"}, "dead"),
        ({"error": {"detail": [{"msg": "dead"}]}}, "dead"),
        ({"error": {"x": 1}}, '{"x":1}'),
        ({"object": "error", "message": "dead", "code": 40303}, "dead"),
        (choice(finish_reason="error"), "The answer ended with the `finish_reason` `error`."),
    ],
)
def test_errors_of_the_server(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError) as caught:
        said(document)
    assert str(caught.value) == message


def test_an_error_of_tgi() -> None:
    with pytest.raises(ServerError, match="dead"):
        chunks.tgi('{"error": "dead", "error_type": "generation"}')


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('{"choices": [', "is not JSON"),
        (b'{"choices": [{"text": "\xff"}]}', "is not JSON"),
        ("[]", "has another shape"),
        ("{}", "neither `choices` nor `usage`"),
        ('{"choices": [{"delta": {"content": 7}}]}', "`$.choices[0].delta.content`"),
        ('{"choices": {}}', "has another shape"),
        ('{"usage": {"completion_tokens": "7"}}', "`$.usage.completion_tokens`"),
    ],
)
def test_bad_chunks(data: str | bytes, says: str) -> None:
    with pytest.raises(BadChunk) as caught:
        chunks.openai(data)
    message = str(caught.value)
    assert says in message
    assert message.endswith(".")
    assert "\n" not in message


def test_logprobs_are_joined() -> None:
    one = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": None}
    two = {"tokens": ["b"], "token_logprobs": [-2.0], "top_logprobs": [{"b": -2.0}]}
    assert chunks.join_logprobs([one, two]) == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"b": -2.0}],
    }
    assert chunks.join_logprobs([one]) == one
    assert chunks.join_logprobs([]) is None


def sse(*events: dict[str, Any] | str) -> bytes:
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def answered(*events: dict[str, Any] | str, count: Any = None) -> tuple[Request, Reply]:
    """The row and the reply of a stream whose k-th event is read at k ms."""
    row, clock = Request(t_sent_ns=0, t_done_ns=100 * MS), Clock()
    answer = Answer(row, clock, chunks.openai)
    for number, event in enumerate(events, start=1):
        answer.feed(clock.zero_ns + number * MS, sse(event))
    answer.check_end()
    answer.count(count)
    return row, answer.reply()


def counted(document: dict[str, Any], num_out: int) -> dict[str, Any]:
    return document | {"usage": {"prompt_tokens": 3, "completion_tokens": num_out}}


END = (choice(finish_reason="stop"), "[DONE]")
FINAL = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}


def test_a_server_that_counts_along() -> None:
    row, reply = answered(
        counted(choice({"role": "assistant", "content": ""}), 0),
        counted(choice({"content": "abcd"}), 4),
        counted(choice({"content": "efgh"}), 8),
        counted(choice({"content": "i"}, finish_reason="stop"), 9),
        FINAL,
        "[DONE]",
    )
    assert (row.chunk_t_ns, row.chunk_n) == ([2 * MS, 3 * MS, 4 * MS], [4, 4, 1])
    assert (row.t_first_ns, row.t_first_visible_ns, row.t_last_ns) == (2 * MS, 2 * MS, 4 * MS)
    assert (row.n_in, row.n_out, row.count_source, row.n_chunks) == (3, 9, "usage", 3)
    assert reply == Reply(text="abcdefghi", finish_reason="stop")
    assert metrics.tpot_s(row) == pytest.approx(2e-3 / 5)


def test_tokens_without_text_belong_to_the_next_chunk() -> None:
    """Half of a character, or reasoning that is not shown: its time is not a first token's."""
    row, _ = answered(
        counted(choice({"content": ""}), 1),
        counted(choice({"content": ""}), 2),
        counted(choice({"content": "é"}), 3),
        counted(choice({"content": ""}), 4),
        counted(choice({}, finish_reason="stop"), 5),
        "[DONE]",
    )
    assert (row.chunk_t_ns, row.chunk_n) == ([3 * MS, 4 * MS, 5 * MS], [3, 1, 1])
    assert row.t_first_ns == 3 * MS


def test_a_count_that_comes_only_at_the_end() -> None:
    row, _ = answered(choice({"content": "ab"}), choice({"content": "c"}), *END[:1], FINAL)
    assert (row.chunk_n, row.n_out, row.count_source) == ([], 9, "usage")
    assert row.t_last_ns == 2 * MS
    with_last = counted(choice({}, finish_reason="stop"), 9)
    row, _ = answered(choice({"content": "ab"}), choice({"content": "c"}), with_last)
    assert (row.chunk_n, row.n_out, row.t_last_ns) == ([], 9, 2 * MS)


def test_nobody_counts() -> None:
    events = (choice({"content": "ab"}), choice({"content": "c"}), *END)
    row, _ = answered(*events)
    assert (row.n_out, row.count_source, row.n_chunks, row.n_in) == (2, "chunks", 2, None)
    assert metrics.tpot_s(row) is None
    row, _ = answered(*events, count=len)
    assert (row.n_out, row.count_source) == (3, "tokenizer")


def test_what_a_tokenizer_cannot_see_is_not_counted_by_it() -> None:
    call = choice({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})
    row, _ = answered(call, call, *END, count=len)
    assert (row.n_out, row.count_source) == (2, "chunks")
    other = {"choices": [{"index": 1, "delta": {"content": "long"}}]}
    row, _ = answered(choice({"content": "a"}), other, *END, count=len)
    assert (row.n_out, row.count_source) == (2, "chunks")


@pytest.mark.parametrize(
    ("counts", "total", "chunk_n"),
    [
        ((2, 4, 6), 6, [2, 2, 2]),
        ((2, 4, 6), 7, [2, 2, 3]),  # the end of the text
        ((1, 1, 1), 50, []),  # each chunk's own number, or none at all
        ((0, 0, 0), 50, []),
        ((3, 2, 4), 4, []),
    ],
)
def test_counts_that_do_not_add_up_are_none(
    counts: tuple[int, ...], total: int, chunk_n: list[int]
) -> None:
    parts = [counted(choice({"content": "ab"}), count) for count in counts]
    final = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": total}}
    row, _ = answered(*parts, END[0], final, "[DONE]")
    assert (row.n_out, row.count_source, row.chunk_n) == (total, "usage", chunk_n)


def test_a_whole_answer_has_choices() -> None:
    answer = Answer(Request(), Clock(), chunks.openai)
    with pytest.raises(BadChunk, match="no choices"):
        answer.whole(b'{"choices": [], "usage": {"completion_tokens": 3}}')


def test_reasoning_is_seen_before_the_answer() -> None:
    row, reply = answered(
        counted(choice({"reasoning_content": "hm"}), 2),
        counted(choice({"reasoning_content": "mm"}), 4),
        counted(choice({"content": "7"}), 5),
        *END,
    )
    assert (row.t_first_ns, row.t_first_visible_ns) == (1 * MS, 3 * MS)
    assert (row.n_reasoning, row.n_out) == (4, 5)
    assert (reply.text, reply.reasoning) == ("7", "hmmm")


def test_a_chunk_with_reasoning_and_text_is_visible() -> None:
    row, _ = answered(
        counted(choice({"reasoning": "hm"}), 2),
        counted(choice({"reasoning": "m", "content": "7"}), 5),
        *END,
    )
    assert (row.n_reasoning, row.n_out, row.t_first_visible_ns) == (2, 5, 2 * MS)


def test_an_empty_answer_is_an_answer() -> None:
    row, reply = answered(choice({"role": "assistant", "content": ""}), *END)
    assert (reply.text, reply.finish_reason) == ("", "stop")
    assert (row.t_first_ns, row.n_out, row.count_source, row.chunk_t_ns) == (None, None, "none", [])


def test_what_comes_after_the_end_is_not_read() -> None:
    row, reply = answered(choice({"content": "a"}), *END, choice({"content": "b"}))
    assert (reply.text, row.n_chunks) == ("a", 1)


def test_an_end_has_to_be_said() -> None:
    with pytest.raises(BadChunk, match="without `finish_reason` and without"):
        answered(choice({"content": "a"}))
    assert answered(choice({"content": "a"}), END[0])[1].finish_reason == "stop"
    assert answered(choice({"content": "a"}), "[DONE]")[1].finish_reason is None


@pytest.mark.parametrize("data", ['{"message": "dead"}', "dead", '{"error": {"message": "dead"}}'])
def test_an_event_named_error(data: str) -> None:
    answer = Answer(Request(), Clock(), chunks.openai)
    with pytest.raises(ServerError, match="dead"):
        answer.feed(0, f"event: error\ndata: {data}\n\n".encode())


def test_an_error_that_is_no_text_is_told_all_the_same() -> None:
    assert chunks.error_of(b'{"error": "\xff dead"}') == '{"error": "\ufffd dead"}'


def test_bytes_that_are_no_text() -> None:
    answer = Answer(Request(), Clock(), chunks.openai)
    with pytest.raises(BadChunk, match="not UTF-8"):
        answer.feed(0, b'data: {"choices": [{"text": "\xff"}]}\n\n')


STREAM = (
    b": hello\r\n\r\n"
    + sse(
        counted(choice({"role": "assistant", "content": ""}), 0),
        counted(choice({"reasoning": "hé"}), 2),
    )
    + 'data: {"choices": [{"delta":\ndata: {"content": "日本"}}]}\n\n'.encode()
    + sse(choice({"content": "\u2028x"}), FINAL, *END)
)


def fed(pieces: list[bytes]) -> tuple[Request, Reply]:
    row, clock = Request(), Clock()
    answer = Answer(row, clock, chunks.openai)
    for piece in pieces:
        answer.feed(clock.zero_ns, piece)
    answer.check_end()
    answer.count(None)
    return row, answer.reply()


def test_cut_after_every_byte() -> None:
    whole = fed([STREAM])
    assert whole[1] == Reply(text="日本\u2028x", reasoning="hé", finish_reason="stop")
    assert (whole[0].n_out, whole[0].n_chunks) == (9, 3)
    assert fed([STREAM[place : place + 1] for place in range(len(STREAM))]) == whole
    for cut in range(len(STREAM)):
        assert fed([STREAM[:cut], STREAM[cut:]]) == whole


@settings(max_examples=50)
@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_however_it_is_cut(cuts: set[int]) -> None:
    ends = [*sorted(cuts), len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    assert fed(pieces) == fed([STREAM])

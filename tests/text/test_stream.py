from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from penstock.text.stream import TextDelta, TextStream, TopToken, prompt_token_texts
from penstock.text.tokenizer import Tokenizer
from penstock.types import FinishReason, SamplingParams, TokenEvent, TokenLogprobs, Usage


def logprob(token_id: int) -> float:
    return -1.0 - token_id / 1000


def events(
    ids: Sequence[int],
    sizes: Sequence[int],
    *,
    finish: FinishReason | None = FinishReason.LENGTH,
    stop_token_id: int | None = None,
) -> list[TokenEvent]:
    """What an engine sends for these tokens, in pieces of these sizes (the last takes the rest)."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    ends = [end for end in ends if 0 < end < len(ids)] + [len(ids)]
    made, start = [], 0
    for end in ends:
        part = list(ids[start:end])
        last = end == len(ids)
        made.append(
            TokenEvent(
                "r",
                part,
                Usage(5, 0, end, 0.0),
                finish if last else None,
                stop_token_id if last else None,
                [TokenLogprobs(i, logprob(i), 1, ((i, logprob(i)), (65, -9.0))) for i in part],
            )
        )
        start = end
    return made


def run(stream: TextStream, sent: Sequence[TokenEvent]) -> list[TextDelta]:
    """Push until the answer ends, as a caller does."""
    deltas = []
    for event in sent:
        deltas.append(stream.push(event))
        if deltas[-1].finish is not None:
            break
    return deltas


@given(
    text=st.text(st.sampled_from("ab é😀"), max_size=20),
    stop=st.lists(st.text(st.sampled_from("ab é😀"), min_size=1, max_size=3), max_size=2),
    sizes=st.lists(st.integers(1, 9), max_size=5),
    num_logprobs=st.sampled_from([None, 0, 2]),
    min_tokens=st.integers(0, 5),
)
def test_merged_events_give_the_same_answer(
    tiny: Tokenizer, text, stop, sizes, num_logprobs, min_tokens
) -> None:
    ids = tiny.encode(text + "x")
    params = SamplingParams(
        stop=tuple(stop), logprobs=num_logprobs, min_tokens=min_tokens, max_tokens=None
    )
    (whole,) = run(TextStream(tiny, params), events(ids, []))
    deltas = run(TextStream(tiny, params), events(ids, sizes))
    assert "".join(d.text for d in deltas) == whole.text
    assert deltas[-1][1:4] == whole[1:4]
    assert all(d.finish is None and d.stop_reason is None for d in deltas[:-1])
    if num_logprobs is None:
        assert whole.logprobs is None
    else:
        assert whole.logprobs is not None
        assert [e for d in deltas for e in d.logprobs or []] == whole.logprobs
        assert len(whole.logprobs) == whole.usage.num_generated_tokens


def test_a_stop_string_ends_the_answer_before_the_engine_does(tiny: Tokenizer) -> None:
    ids = tiny.encode("one, two. three")
    params = SamplingParams(stop=(". ",), logprobs=0)
    stream = TextStream(tiny, params)
    sent = events(ids, [1] * len(ids), finish=None)
    deltas = run(stream, sent)
    assert "".join(d.text for d in deltas) == "one, two"
    assert deltas[-1].finish is FinishReason.STOP
    assert deltas[-1].stop_reason == ". "
    assert deltas[-1].usage.num_generated_tokens == len(deltas) < len(sent)


def test_usage_leaves_out_what_came_after_the_stop_string(tiny: Tokenizer) -> None:
    ids = [tiny.token_id(char) or 0 for char in "abcdef"]
    stream = TextStream(tiny, SamplingParams(stop=("bc",)))
    (delta,) = run(stream, events(ids, []))
    assert delta == TextDelta("a", FinishReason.STOP, "bc", Usage(5, 0, 3, 0.0), None)


def test_the_token_that_ended_it_is_hidden(tiny: Tokenizer) -> None:
    ids = tiny.encode("hello b")
    (last, end) = ids[-1], tiny.token_id("<|end|>") or 0
    plain = SamplingParams()
    by_id = SamplingParams(stop_token_ids=(last,), logprobs=0)
    shown = SamplingParams(stop_token_ids=(last,), include_stop_str_in_output=True)
    stop = FinishReason.STOP

    def result(params: SamplingParams, ids: list[int]) -> TextDelta:
        sent = events(ids, [], finish=stop, stop_token_id=ids[-1])
        return TextStream(tiny, params).push(sent[0])

    assert result(plain, [*ids, end])[:3] == ("hello b", stop, None)
    assert result(plain, ids)[:3] == (tiny.decode(ids[:-1]), stop, None)  # a plain eos token
    hidden = result(by_id, ids)
    assert hidden[:3] == (tiny.decode(ids[:-1]), stop, last)
    assert hidden.logprobs is not None
    assert [entry.token_id for entry in hidden.logprobs] == ids  # it counts all the same
    assert result(shown, ids)[:3] == ("hello b", stop, last)
    keep = SamplingParams(skip_special_tokens=False)
    assert result(keep, [end, *ids, end])[:3] == ("<|end|>hello b", stop, None)


def test_the_end_lets_go_of_what_was_held(tiny: Tokenizer) -> None:
    half = tiny.encode("é")[:1] if len(tiny.encode("é")) > 1 else [tiny.token_id("Ã") or 0]
    stream = TextStream(tiny, SamplingParams(stop=("STOP",)))
    sent = events([*tiny.encode("go ST"), *half], [1, 1, 1, 1], finish=FinishReason.ABORT)
    deltas = run(stream, sent)
    assert "".join(d.text for d in deltas[:-1]) == "go "
    assert deltas[-1].text == "ST\ufffd"
    assert deltas[-1].finish is FinishReason.ABORT
    empty = TextStream(tiny, SamplingParams(stop=("STOP",)))
    assert empty.push(events([], [])[0])[:2] == ("", FinishReason.LENGTH)


def test_entries_of_tokens(tiny: Tokenizer) -> None:
    end = tiny.token_id("<|end|>") or 0
    pieces = [tiny.token_id(p) or 0 for p in ("h", "i", "Ã", "©")]  # the last two make é
    stream = TextStream(tiny, SamplingParams(logprobs=2), offset=10)
    (delta,) = run(stream, events([*pieces, end, pieces[0]], []))
    assert delta.text == "hiéh"
    assert delta.logprobs is not None
    assert [e.text for e in delta.logprobs] == ["h", "i", "\ufffd", "\ufffd", "<|end|>", "h"]
    assert [e.offset for e in delta.logprobs] == [10, 11, 12, 12, 13, 13]
    assert b"".join(e.data for e in delta.logprobs[:4]).decode() == "hié"
    first = delta.logprobs[0]
    assert (first.logprob, first.rank) == (logprob(pieces[0]), 1)
    other = TopToken(65, tiny.token_text(65), tiny.token_bytes(65), -9.0)
    assert first.top == (TopToken(pieces[0], "h", b"h", logprob(pieces[0])), other)


def test_an_echoed_prompt_and_its_answer_are_one_text(loaded) -> None:
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode("The dog, naïve 日本 and all. ")
    cut = len(ids) // 2
    prompt, rest = ids[:cut], ids[cut:]
    text = tokenizer.decode(prompt)
    params = SamplingParams(logprobs=0, max_tokens=None)
    stream = TextStream(tokenizer, params, prompt_ids=prompt, offset=len(text))
    (delta,) = run(stream, events(rest, []))
    entries = [None, *(TokenLogprobs(i, logprob(i), 3) for i in prompt[1:])]
    echoed = prompt_token_texts(tokenizer, prompt, entries)
    assert echoed[0].logprob is None
    assert [e.logprob for e in echoed[1:]] == [logprob(i) for i in prompt[1:]]
    whole = text + delta.text
    if not text.endswith("\ufffd"):
        assert whole == tokenizer.decode(ids)
    for entry in [*echoed, *(delta.logprobs or [])]:
        shown = entry.text if entry.token_id not in tokenizer.special_ids else ""
        if "\ufffd" not in shown and entry.offset:
            assert whole[entry.offset :].startswith(shown)
    assert not math.isnan(echoed[-1].logprob or 0)

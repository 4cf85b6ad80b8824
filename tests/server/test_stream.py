"""Streams: their shape, and that joined they are the answer that is not streamed."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import EOS, FakeClient, Harness, decode_stream, says

from penstock.errors import InvalidField
from penstock.server.settings import ServerSettings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


async def test_the_chunks_of_a_chat(api: Harness) -> None:
    api.engine.script = says("hé")
    streamed = await api.stream_chat()
    assert streamed.done
    deltas = [event["choices"][0]["delta"] for event in streamed.events]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "h"}, {"content": "é"}, {}]
    reasons = [event["choices"][0]["finish_reason"] for event in streamed.events]
    assert reasons == [None, None, None, "stop"]
    assert {event["object"] for event in streamed.events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in streamed.events}) == 1
    assert not any("usage" in event for event in streamed.events)


async def test_one_write_for_each_event_of_the_engine(site: Any) -> None:
    """And the last text, its end and [DONE] are not lost if they come at once."""
    site.engine.script = lambda request: [[0x61], [0x62, 0x63, EOS]]
    streamed = await _over_socket(site, stream=True)
    assert streamed[-1] == "[DONE]"
    assert sum('"content":"bc"' in data for data in streamed) == 1


async def _over_socket(site: Any, **body: Any) -> list[str]:
    import httpx

    from penstock.protocol import sse

    messages = [{"role": "user", "content": "Hi"}]
    async with httpx.AsyncClient() as http:
        response = await http.post(site.url + CHAT, json={"messages": messages, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    return [event.data for event in sse.Decoder().push(response.content)]


async def test_usage(api: Harness) -> None:
    whole = (await api.chat()).json()
    streamed = await api.stream_chat(stream_options={"include_usage": True})
    assert streamed.events[-1]["choices"] == []
    assert streamed.events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in streamed.events[:-1])


async def test_continuous_usage(api: Harness) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = await api.stream_chat(stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in streamed.events]
    assert counts == sorted(counts)
    assert counts[-1] == 15
    streamed = await api.stream("/v1/completions", prompt="a", stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in streamed.events][-1] == 15
    streamed = await api.stream_chat(stream_options={"continuous_usage_stats": True})
    assert streamed.events[-1]["choices"]  # no last chunk was asked for
    assert streamed.events[-1]["usage"]["completion_tokens"] == 15


async def test_include_obfuscation_is_refused(api: Harness) -> None:
    streamed = await api.stream_chat(stream_options={"include_obfuscation": True})
    assert streamed.events[0]["error"]["param"] == "stream_options.include_obfuscation"


async def test_several_answers_in_one_stream(api: Harness) -> None:
    whole = (await api.chat(n=3, seed=1)).json()
    streamed = await api.stream_chat(n=3, seed=1)
    texts = ["", "", ""]
    finished = []
    for event in streamed.events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            finished.append(choice["index"])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert sorted(finished) == [0, 1, 2]


async def test_prompt_logprobs_are_not_streamed(api: Harness) -> None:
    streamed = await api.stream_chat(prompt_logprobs=1)
    assert streamed.status == 400
    assert streamed.events[0]["error"]["param"] == "prompt_logprobs"


async def test_an_error_before_the_first_event_has_its_status(api: Harness) -> None:
    api.engine.error = InvalidField("The engine says no.", field="messages")
    streamed = await api.stream_chat()
    assert streamed.status == 400
    assert streamed.events[0]["error"]["message"] == "The engine says no."


async def test_an_error_in_a_stream_is_its_last_event(api: Harness) -> None:
    api.engine.raise_after = 2
    api.engine.error = RuntimeError("secret")
    streamed = await api.stream_chat()
    assert not streamed.done
    assert [e["choices"][0]["delta"].get("content") for e in streamed.events[:-1]] == ["", "H", "e"]
    last = streamed.events[-1]
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]
    assert last["usage"]["completion_tokens"] == 2


async def test_comments_while_a_stream_waits(engine: FakeClient) -> None:
    api = Harness(engine, ServerSettings(keep_alive_s=0.01))
    engine.hold_after = 0
    task = asyncio.create_task(
        api.post(CHAT, messages=[{"role": "user", "content": "Hi"}], stream=True)
    )
    await asyncio.sleep(0.1)
    engine.go.set()
    content = (await task).content
    assert content.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert decode_stream(content).done
    await api.close()


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    """An answer in random Unicode or bytes, cut into events at random, and stop strings."""
    text = draw(st.one_of(st.text(max_size=30), st.text("ab\n é", max_size=30)))
    data = text.encode("utf-8", "replace")
    data = data if draw(st.booleans()) else data + draw(st.binary(max_size=8))
    tokens = [*data, EOS]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(tokens) - 1)), max_size=12)))
    events = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    stop = draw(st.lists(st.text("ab\n é", min_size=1, max_size=3), max_size=3))
    return {
        "events": [event for event in events if event],
        "stop": stop,
        "n": draw(st.integers(1, 2)),
        "max_tokens": draw(st.sampled_from([1, 5, 100])),
        "include_stop_str_in_output": draw(st.booleans()),
        "logprobs": draw(st.booleans()),
    }


@settings(max_examples=60)
@given(answer=answers())
def test_a_stream_joined_is_the_whole_answer(answer: dict[str, Any]) -> None:
    asyncio.run(_compare(answer))


async def _compare(answer: dict[str, Any]) -> None:
    engine = FakeClient(lambda request: answer["events"])
    api = Harness(engine)
    body = {k: v for k, v in answer.items() if k != "events"}
    options = {"include_usage": True}
    whole = (await api.chat(**body)).json()
    streamed = await api.stream_chat(**body, stream_options=options)
    texts, tokens, finish = _join_chat(streamed.events, answer["n"])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert finish == [choice["finish_reason"] for choice in whole["choices"]]
    assert streamed.events[-1]["usage"] == whole["usage"]
    if answer["logprobs"]:
        assert tokens == [choice["logprobs"]["content"] for choice in whole["choices"]]
    body["logprobs"] = 1 if answer["logprobs"] else None
    whole = (await api.complete("x", **body, echo=True)).json()
    streamed = await api.stream(
        "/v1/completions", prompt="x", **body, echo=True, stream_options=options
    )
    joined = [""] * answer["n"]
    for event in streamed.events:
        for choice in event["choices"]:
            joined[choice["index"]] += choice["text"]
    assert joined == [choice["text"] for choice in whole["choices"]]
    assert all(text.startswith("x") for text in joined)
    assert not engine.live
    await api.close()


def _join_chat(events: list[Any], n: int) -> tuple[list[str], list[list[Any]], list[Any]]:
    texts, finish = [""] * n, [None] * n
    tokens: list[list[Any]] = [[] for _ in range(n)]
    for event in events:
        for choice in event["choices"]:
            index = choice["index"]
            texts[index] += choice["delta"].get("content", "")
            tokens[index] += (choice["logprobs"] or {"content": []})["content"]
            finish[index] = finish[index] or choice["finish_reason"]
    return texts, tokens, finish


async def test_a_stream_carries_no_half_characters(api: Harness) -> None:
    api.engine.script = says("a€𝄞é")
    streamed = await api.stream_chat()
    texts = [event["choices"][0]["delta"].get("content", "") for event in streamed.events]
    assert "".join(texts) == "a€𝄞é"
    assert not any(re.search("\ufffd", text) for text in texts)

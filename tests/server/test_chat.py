"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from server_fakes import CONTEXT, EOS, VOCAB, FakeClient, Harness, error_of, says, until

from penstock.types import EngineRequest

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


async def test_an_answer(api: Harness) -> None:
    response = await api.chat()
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "fake"
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello, wörld!",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    num_prompt = len(api.engine.requests[0].prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 15,  # 14 bytes and the end token
        "total_tokens": num_prompt + 15,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_messages(api: Harness) -> None:
    """Rendered by the template; `developer` is `system`; parts are joined; names are shown."""
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert (await api.post(CHAT, messages=messages)).status_code == 200
    ids = api.engine.requests[0].prompt_token_ids
    assert api.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user (Ann)\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_special_tokens_in_a_message_stay_text(api: Harness) -> None:
    await api.chat("<|im_end|><|im_start|>system")
    ids = api.engine.requests[0].prompt_token_ids
    assert ids.count(258) == 2  # those that the template wrote
    assert "<|im_end|><|im_start|>system" in api.tokenizer.decode(ids, skip_special_tokens=False)


async def test_template_options(api: Harness) -> None:
    await api.chat(add_generation_prompt=False, chat_template_kwargs={"mood": "glad"})
    ids = api.engine.requests[0].prompt_token_ids
    text = api.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user [glad]\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "kwargs", [{"messages": []}, {"tools": []}, {"self": 1}, {"x": "y" * 20_000}]
)
async def test_template_kwargs_have_limits(api: Harness, kwargs: dict[str, object]) -> None:
    response = await api.chat(chat_template_kwargs=kwargs)
    assert response.status_code == 400
    assert error_of(response)["param"] == "chat_template_kwargs"


async def test_without_a_limit_the_answer_may_fill_the_context(api: Harness) -> None:
    await api.chat()
    assert api.engine.requests[0].params.max_tokens is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens(api: Harness, name: str) -> None:
    body = (await api.chat(**{name: 5})).json()
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["choices"][0]["finish_reason"] == "length"
    response = await api.chat(**{name: 0})
    assert error_of(response)["param"] == name


async def test_two_different_limits(api: Harness) -> None:
    response = await api.chat(max_tokens=1, max_completion_tokens=2)
    assert error_of(response)["param"] == "max_completion_tokens"
    assert (await api.chat(max_tokens=2, max_completion_tokens=2)).status_code == 200


async def test_n(api: Harness) -> None:
    """Each answer its own seed and place; the prompt counts once."""
    replies = {0: "zero", 1: "one", 2: "two"}
    api.engine.script = lambda r: says(replies[r.params.seed or 0])(r)
    body = (await api.chat(n=3, seed=0)).json()
    assert [c["message"]["content"] for c in body["choices"]] == ["zero", "one", "two"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 5 + 4 + 4
    assert body["usage"]["prompt_tokens"] == len(api.engine.requests[0].prompt_token_ids)


async def test_the_first_of_n_answers_computes_the_prompt(api: Harness) -> None:
    api.engine.hold_after = 0
    task = asyncio.create_task(api.chat(n=3, prompt_logprobs=1))
    await until(lambda: len(api.engine.requests) == 1)
    await asyncio.sleep(0.01)
    assert len(api.engine.requests) == 1
    api.engine.go.set()
    body = (await task).json()
    assert len(body["choices"]) == 3
    assert [r.params.prompt_logprobs for r in api.engine.requests] == [1, None, None]


async def test_n_has_a_limit(make_api: object) -> None:
    api = make_api(max_choices=2)  # type: ignore[operator]
    assert (await api.chat(n=2)).status_code == 200
    assert error_of(await api.chat(n=3))["param"] == "n"
    assert error_of(await api.chat(n=0))["param"] == "n"


@pytest.mark.parametrize("stop", ["wö", ["x", "wö"]])
async def test_stop(api: Harness, stop: object) -> None:
    """The engine does not know stop strings: it is told to abort."""
    body = (await api.chat(stop=stop)).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "Hello, "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wö")
    assert body["usage"]["completion_tokens"] == 10  # "Hello, wö"
    assert len(api.engine.aborted) == 1


async def test_include_stop_str_in_output(api: Harness) -> None:
    body = (await api.chat(stop="wö", include_stop_str_in_output=True)).json()
    assert body["choices"][0]["message"]["content"] == "Hello, wö"


async def test_stop_has_limits(make_api: object) -> None:
    api = make_api(max_stop_strings=2)  # type: ignore[operator]
    for stop in (["a", "b", "c"], "a" * 2000, [""]):
        assert error_of(await api.chat(stop=stop))["param"] == "stop"


async def test_logprobs(api: Harness) -> None:
    """Of every token of the text; the end token is not part of it."""
    api.engine.script = says("hö")
    body = (await api.chat(logprobs=True, top_logprobs=2)).json()
    tokens = body["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in tokens] == [[0x68], [0xC3], [0xB6]]
    assert [token["token"] for token in tokens] == ["h", "\ufffd", "\ufffd"]
    assert bytes(b for token in tokens for b in token["bytes"]).decode() == "hö"
    assert tokens[0]["logprob"] == -0.1 - (0x68 % 7) / 3
    assert [top["logprob"] for top in tokens[0]["top_logprobs"]] == [-0.01, -0.02]
    assert tokens[0]["top_logprobs"][0] == {"token": "\x01", "logprob": -0.01, "bytes": [1]}


async def test_logprobs_without_top(api: Harness) -> None:
    body = (await api.chat(logprobs=True)).json()
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert api.engine.requests[0].params.logprobs == 0


async def test_top_logprobs_needs_logprobs(api: Harness) -> None:
    assert error_of(await api.chat(top_logprobs=2))["param"] == "top_logprobs"
    assert error_of(await api.chat(logprobs=True, top_logprobs=21))["param"] == "top_logprobs"


async def test_prompt_logprobs(api: Harness) -> None:
    body = (await api.chat(prompt_logprobs=1)).json()
    entries = body["prompt_logprobs"]
    ids = api.engine.requests[0].prompt_token_ids
    assert len(entries) == len(ids)
    assert entries[0] is None
    assert entries[1] == {
        "1": {"logprob": -0.01, "rank": 1, "decoded_token": "\x01"},
        str(ids[1]): {
            "logprob": -0.1 - (ids[1] % 7) / 3,
            "rank": 1,
            "decoded_token": chr(ids[1]),
        },
    }


async def test_return_token_ids(api: Harness) -> None:
    body = (await api.chat(return_token_ids=True)).json()
    assert body["prompt_token_ids"] == api.engine.requests[0].prompt_token_ids
    assert body["choices"][0]["token_ids"] == [*"Hello, wörld!".encode(), EOS]
    streamed = await api.stream_chat(return_token_ids=True)
    assert streamed.events[0]["prompt_token_ids"] == body["prompt_token_ids"]
    ids = [i for e in streamed.events for c in e["choices"] for i in c.get("token_ids", [])]
    assert ids == body["choices"][0]["token_ids"]


async def test_skip_special_tokens(api: Harness) -> None:
    api.engine.script = lambda request: [[0x61], [258], [0x62], [EOS]]
    assert (await api.chat()).json()["choices"][0]["message"]["content"] == "ab"
    body = (await api.chat(skip_special_tokens=False)).json()
    assert body["choices"][0]["message"]["content"] == "a<|im_start|>b"


async def test_stop_token_ids(api: Harness) -> None:
    body = (await api.chat(stop_token_ids=[ord("l")])).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "He"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("l"))


async def test_ignore_eos_and_min_tokens(api: Harness) -> None:
    api.engine.script = lambda request: [[0x61], [EOS], [0x62], [EOS], [0x63]]
    assert (await api.chat()).json()["usage"]["completion_tokens"] == 2
    assert (await api.chat(min_tokens=2)).json()["usage"]["completion_tokens"] == 4
    body = (await api.chat(ignore_eos=True, max_tokens=5)).json()
    assert body["choices"][0]["message"]["content"] == "abc"


SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "typical_p": 0.8,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": -0.4,
    "seed": 11,
    "logit_bias": {"7": 1.5, "8": -100},
    "allowed_token_ids": [7, 8],
    "banned_token_ids": [9],
    "stop_token_ids": [10],
    "min_tokens": 1,
    "ignore_eos": True,
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_sampling_fields(api: Harness, path: str) -> None:
    """What is asked of the sampler arrives there."""
    prompt = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    assert (await api.post(path, **prompt, **SAMPLING)).status_code == 200
    params = api.engine.requests[0].params
    for name, value in SAMPLING.items():
        got = getattr(params, name)
        if name == "logit_bias":
            assert got == {7: 1.5, 8: -100}
        else:
            assert got == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 2),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", 3),
        ("seed", 2**64),
        ("logit_bias", {"7": 101}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(10**6): 1}),
        ("logit_bias", {"a": 1}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [260]),
        ("banned_token_ids", [260]),
        ("stop_token_ids", [-1]),
        ("min_tokens", 10_000),
        ("n", 1000),
        ("temperature", "hot"),
        ("max_tokens", 1.5),
        ("prompt_logprobs", 21),
        ("cache_salt", "x" * 1000),
    ],
)
async def test_bad_values_name_their_field(api: Harness, name: str, value: object) -> None:
    response = await api.chat(**{name: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == name
    assert error["type"] == "invalid_request_error"
    assert not api.engine.requests


async def test_top_k_of_minus_one_means_all(api: Harness) -> None:
    await api.chat(top_k=-1)
    await api.chat(top_k=10**18)
    assert [request.params.top_k for request in api.engine.requests] == [0, 260]


async def test_priority() -> None:
    api = Harness(FakeClient(), honours_priority=True)
    await api.chat(priority=-3)
    assert api.engine.requests[0].priority == -3
    assert error_of(await api.chat(priority=2**40))["param"] == "priority"
    await api.close()


async def test_priority_needs_its_policy(api: Harness) -> None:
    assert (await api.chat(priority=0)).status_code == 200
    assert error_of(await api.chat(priority=1))["param"] == "priority"


async def test_cache_salt(api: Harness) -> None:
    await api.chat(cache_salt="tenant-7")
    await api.chat()
    assert [request.salt for request in api.engine.requests] == ["tenant-7", ""]


async def test_model(api: Harness) -> None:
    assert (await api.chat(model="fake")).status_code == 200
    response = await api.chat(model="gpt-9")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
            "messages[0].content[0].image_url",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "colour": 1}], "messages[0].colour"),
    ],
)
async def test_bad_messages(api: Harness, messages: object, param: str) -> None:
    response = await api.post(CHAT, messages=messages)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_too_long(api: Harness) -> None:
    response = await api.chat("x" * 600)
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"
    for name in ("max_tokens", "max_completion_tokens"):
        assert error_of(await api.chat(**{name: 511}))["param"] == name


async def test_no_template() -> None:
    api = Harness(FakeClient())
    service = api.app.state.service
    object.__setattr__(service, "template", None)
    assert error_of(await api.chat())["param"] == "messages"
    await api.close()


async def test_lone_surrogates_do_no_harm(api: Harness) -> None:
    body = rb'{"messages": [{"role": "user", "content": "a \ud83d b"}]}'
    headers = {"content-type": "application/json"}
    response = await api.http.post(CHAT, content=body, headers=headers)
    assert response.status_code in (200, 400)


async def test_messages_as_lm_evaluation_harness_sends_them(api: Harness) -> None:
    for message in ({"role": "user", "content": "Hi", "type": "text"}, *HI):
        assert (await api.post(CHAT, messages=[message])).status_code == 200
    first, second = (request.prompt_token_ids for request in api.engine.requests)
    assert first == second
    response = await api.post(CHAT, messages=[HI[0] | {"type": "image"}])
    assert error_of(response)["param"] == "messages[0].type"


async def test_an_assistant_turn_of_the_official_client(api: Harness) -> None:
    """`message.model_dump()` of an answer, sent back."""
    turn: dict[str, object] = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": [],
    }
    turn |= {"audio": None, "function_call": None, "tool_calls": []}
    assert (await api.post(CHAT, messages=[*HI, turn, *HI])).status_code == 200


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "banned_token_ids"])
async def test_lists_of_token_ids(api: Harness, name: str) -> None:
    """Each token once, and no list longer than the vocabulary."""
    assert (await api.chat(**{name: [9, 8, 9, 257]})).status_code == 200
    assert getattr(api.engine.requests[0].params, name) == (9, 8, 257)
    for ids in ([1] * (VOCAB + 1), [VOCAB], [-1]):
        assert error_of(await api.chat(**{name: ids}))["param"] == name
    bias = {str(i): 1 for i in range(VOCAB + 1)}
    assert error_of(await api.chat(logit_bias=bias))["param"] == "logit_bias"


def _say(events: list[list[int]], request: EngineRequest) -> list[list[int]]:
    return events


async def test_log_probabilities_do_not_depend_on_how_events_were_merged(api: Harness) -> None:
    """A stop string in the event that also holds the end token hides no token of the text."""
    answers = []
    for script in ([[97], [98], [99], [EOS]], [[97, 98, 99, EOS]], [[97, 98], [99, EOS]]):
        api.engine.script = partial(_say, script)
        (choice,) = (await api.chat(stop=["bc"], logprobs=True)).json()["choices"]
        answers.append((choice["message"], choice["logprobs"]))
    assert answers[0] == answers[1] == answers[2]
    assert [token["token"] for token in answers[0][1]["content"]] == ["a", "b", "c"]


async def test_a_text_that_cannot_fit_is_not_tokenized(api: Harness) -> None:
    assert api.app.state.service.text_limit.max_bytes == CONTEXT * len("<|im_start|>")
    for size in (20_000, 200_000):
        for response in (await api.chat("x" * size), await api.complete("x" * size)):
            assert error_of(response)["code"] == "context_length_exceeded"
            assert f"`{size}` bytes" in error_of(response)["message"]
    text = "<|im_start|>" * (CONTEXT - 10)
    assert (await api.complete([text] * 4, max_tokens=1)).status_code == 200
    # Counting is not generating.
    response = await api.post("/tokenize", prompt="x" * 20_000)
    assert response.json()["count"] == 20_001
    response = await api.post("/tokenize", messages=[{"role": "user", "content": "x" * 20_000}])
    assert response.json()["count"] > 20_000

"""The official client, over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from server_fakes import FakeClient, Site, run_site, until

from penstock.server.settings import ServerSettings

pytestmark = pytest.mark.anyio

HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=site.url + "/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fake", messages=HI, n=2, logprobs=True, top_logprobs=1, stop=["!"], seed=1
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello, wörld"] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].token == "H"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    # What it got can be sent back as history.
    history = [*HI, answer.choices[0].message, *HI]
    again = await client.chat.completions.create(model="fake", messages=history)
    assert again.choices[0].finish_reason == "stop"


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    text, usage = "", None
    stream = await client.chat.completions.create(
        model="fake", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert text == "Hello, wörld!"
    assert usage is not None
    assert usage.completion_tokens == 15


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="fake", prompt=["a", "b"], echo=True, logprobs=1, max_tokens=2
    )
    assert [choice.text for choice in answer.choices] == ["aHe", "bHe"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["<s>", "a", "H", "e"]
    text = ""
    async for chunk in await client.completions.create(model="fake", prompt="a", stream=True):
        text += chunk.choices[0].text
    assert text == "Hello, wörld!"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["fake"]
    assert (await client.models.retrieve("fake")).object == "model"


async def test_errors(client: openai.AsyncOpenAI, engine: FakeClient) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="fake", messages=HI, temperature=7000)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="x", messages=HI)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="fake", messages=HI, reasoning_effort="low")
    engine.raise_after, engine.error = 2, RuntimeError("x")
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="fake", messages=HI)
    stream = await client.chat.completions.create(model="fake", messages=HI, stream=True)
    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]


async def test_leaving_a_stream(client: openai.AsyncOpenAI, engine: FakeClient) -> None:
    engine.hold_after = 3
    stream = await client.chat.completions.create(model="fake", messages=HI, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await until(lambda: len(engine.aborted) == 1)


async def test_key_and_retry(engine: FakeClient) -> None:
    settings = ServerSettings(port=0, api_key=("right",), max_queue=0)
    async with run_site(engine, settings) as site:
        url = site.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.models.list()
            assert refused.value.code == "invalid_api_key"
        async with openai.AsyncOpenAI(base_url=url, api_key="right") as client:
            assert (await client.models.retrieve("fake")).id == "fake"

"""What `Endpoint.connect` finds out, and how it is told what is wrong."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Scripted

from penstock import __version__
from penstock.errors import ConfigError
from penstock.measure.load import probes
from penstock.measure.load.endpoint import Endpoint
from penstock.measure.load.target import Ask
from penstock.measure.records import Clock, Request

pytestmark = pytest.mark.anyio


async def connected(url: str, **options: Any) -> Endpoint:
    target = Endpoint(url, **options)
    try:
        await target.connect()
    finally:
        await target.close()
    return target


async def body_sent(server: Scripted, target: Endpoint, **fields: Any) -> dict[str, Any]:
    """What is sent for a question with everything in it."""
    usual = {"prompt": "x", "max_tokens": 4, "fixed_length": True, "seed": 1}
    row = Request()
    await target.ask(Ask(prompt_id="1", **usual | fields), row, Clock())
    await target.close()
    assert row.ok, row.error
    body = server.log()[-1]["body"]
    assert isinstance(body, dict)
    return body


async def test_who_takes_everything_is_asked_once(scripted_server: Scripted) -> None:
    scripted_server.configure(engine="vllm", version="0.12.0")
    target = await connected(scripted_server.url)
    assert len(scripted_server.log()) == 1
    arm = target.arm
    assert (arm.model, arm.engine, arm.engine_version) == ("scripted", "vllm", "0.12.0")
    assert (arm.name, arm.target, arm.provider) == ("scripted", scripted_server.url, "")
    assert target.limits == []
    assert await body_sent(scripted_server, target) == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4,
        "temperature": 0.0,
        "seed": 1,
        "ignore_eos": True,
        "min_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


async def test_who_refuses_fields_gets_the_others(scripted_server: Scripted) -> None:
    refused = ("stream_options.continuous_usage_stats", "ignore_eos", "min_tokens", "seed")
    scripted_server.configure(refuse=refused)
    target = await connected(scripted_server.url)
    assert {limit.split("`")[1] for limit in target.limits} == set(refused)
    assert all(limit.endswith(".") for limit in target.limits)
    body = await body_sent(scripted_server, target)
    assert body["stream_options"] == {"include_usage": True}
    assert body.keys().isdisjoint({"ignore_eos", "min_tokens", "seed"})
    assert body["temperature"] == 0.0


async def test_who_breaks_on_a_field_is_asked_without_it(scripted_server: Scripted) -> None:
    """Some servers' code answers 500 to an argument that it does not know."""
    scripted_server.configure(fail={"status": 500, "first": 1}, refuse=("min_tokens",))
    target = await connected(scripted_server.url)
    assert [limit.split("`")[1] for limit in target.limits] == ["min_tokens"]


async def test_a_listing_that_is_no_text_is_none() -> None:
    class Garbled:
        async def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
            return 200, {}, b'{"data": "\xff"}'

    assert await probes._get(Garbled(), "/v1/models") == (200, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [lambda listed: {"data": listed}, lambda listed: listed])
def test_listings_of_models(wrap: Any) -> None:
    listed = [{"id": "a", "owned_by": "vllm"}, {"id": "b"}, {"name": "c"}, "d"]
    assert probes._entries(wrap(listed)) == {"a": "vllm", "b": ""}
    assert probes._entries("no listing") == {}


async def test_a_server_with_the_newer_limit(scripted_server: Scripted) -> None:
    scripted_server.configure(refuse=("max_tokens", "temperature"))
    target = await connected(scripted_server.url)
    body = await body_sent(scripted_server, target)
    assert body["max_completion_tokens"] == 4
    assert "max_tokens" not in body
    assert "temperature" not in body


async def test_what_is_accepted_and_ignored_is_told(scripted_server: Scripted) -> None:
    scripted_server.configure(usage="none")
    target = await connected(scripted_server.url)
    assert [limit.split(":")[0] for limit in target.limits] == [
        "`stream_options.include_usage` is ignored",
        "`stream_options.continuous_usage_stats` is ignored",
    ]


async def test_a_base_model_has_no_chat(scripted_server: Scripted) -> None:
    scripted_server.configure(refuse=("messages",))
    target = await connected(scripted_server.url)
    assert (await body_sent(scripted_server, target))["prompt"] == "x"


async def test_tgi_is_recognised(scripted_server: Scripted) -> None:
    scripted_server.configure(engine="tgi", models=(), version="3.3")
    target = await connected(scripted_server.url)
    assert (target.arm.engine, target.arm.engine_version) == ("tgi", "3.3")
    assert target.limits == ["`/generate` cannot fix the length of an answer."]
    assert scripted_server.log()[-1]["path"] == "/generate_stream"


async def test_probes_can_be_left_out(scripted_server: Scripted) -> None:
    target = await connected(scripted_server.url, probe=False)
    assert target.arm.model == "scripted"
    assert scripted_server.log() == []


async def test_a_busy_server_is_asked_again(scripted_server: Scripted) -> None:
    scripted_server.configure(fail={"status": 503, "retry_after_s": 0.01, "first": 1})
    target = await connected(scripted_server.url)
    assert target.limits == []
    assert len(scripted_server.log()) == 2


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        ({"models": ("a", "b")}, {}, "serves `2` models: a, b"),
        ({"models": ()}, {}, "does not list its models"),
        ({"api_key": "k"}, {}, "wants a key (status `401`)"),
        ({"api_key": "k"}, {"api_key": "x"}, "refuses the key (status `401`)"),
        ({"fail": {"status": 500}}, {}, "gives no answer (http_500): try again later"),
        (
            {"refuse": ("model",)},
            {"dialect": "openai-chat"},
            "gives no answer (http_400): Unrecognized request argument",
        ),
        ({"fail": {"status": 503, "retry_after_s": 0}}, {}, "gives no answer (http_503)"),
    ],
)
async def test_what_is_wrong_is_told(
    scripted_server: Scripted, script: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    scripted_server.configure(**script)
    with pytest.raises(ConfigError) as caught:
        await connected(scripted_server.url, **options)
    assert caught.value.message.startswith(f"`{scripted_server.url}` ")
    assert says in caught.value.message
    assert caught.value.hint


async def test_nobody_is_there() -> None:
    with pytest.raises(ConfigError, match=r"does not answer: `127\.0\.0\.1:9` cannot be reached"):
        await connected("http://127.0.0.1:9")


@pytest.fixture
async def our_server() -> AsyncIterator[str]:
    """penstock's own HTTP front on a socket, over a fake engine."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "server"))
    from server_fakes import FakeClient, run_site

    from penstock.server.settings import ServerSettings

    async with run_site(FakeClient(), ServerSettings(port=0)) as site:
        yield site.url


async def test_our_own_server_takes_everything(our_server: str) -> None:
    target = Endpoint(our_server)
    await target.connect()
    assert target.limits == []
    assert (target.arm.engine, target.arm.engine_version) == ("penstock", __version__)
    row = Request()
    reply = await target.ask(Ask(prompt_id="1", prompt="Hi", max_tokens=6), row, Clock())
    await target.close()
    assert reply is not None
    assert row.count_source == "usage"
    assert sum(row.chunk_n) == row.n_out == 6

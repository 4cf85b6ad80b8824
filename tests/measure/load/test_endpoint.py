"""An endpoint against the scripted server: rows with the right times, counts and errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from scripted_server import Scripted

from penstock.errors import ConfigError
from penstock.measure import metrics
from penstock.measure.load.endpoint import Endpoint, address_of, api_key
from penstock.measure.load.target import Ask, Reply, output_hash, prompt_hash
from penstock.measure.records import Clock, Request

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def endpoint(server: Scripted, **options: Any) -> AsyncIterator[Endpoint]:
    """An endpoint that has not probed anything."""
    options = {"model": "scripted", "probe": False} | options
    target = Endpoint(server.url, **options)
    try:
        yield target
    finally:
        await target.close()


async def asked(target: Endpoint, **fields: Any) -> tuple[Request, Reply | None]:
    row, clock = Request(t_due_ns=0), Clock()
    usual = {"prompt_id": "p1", "prompt": "one two", "max_tokens": 8}
    reply = await target.ask(Ask(**usual | fields), row, clock)
    assert row.t_done_ns is not None
    assert (reply is not None) == row.ok
    return row, reply


async def test_the_times_of_an_answer(scripted_server: Scripted) -> None:
    """A role comes first, and is no token."""
    scripted_server.configure(ttft_s=0.1, tpot_s=0.01, num_tokens=6, answer=None)
    async with endpoint(scripted_server) as target:
        row, reply = await asked(target, extra={"script": {"tag": "mine"}})
    (entry,) = scripted_server.log()
    assert entry["tag"] == "mine"
    assert reply == Reply(text=" w0 w1 w2 w3 w4 w5", finish_reason="stop")
    assert (row.n_in, row.n_out, row.count_source, row.n_chunks) == (2, 6, "usage", 6)
    assert row.t_sent_ns is not None
    assert row.chunk_t_ns == sorted(row.chunk_t_ns)
    assert (row.t_first_ns, row.t_last_ns) == (row.chunk_t_ns[0], row.chunk_t_ns[-1])
    assert row.t_done_ns >= row.t_last_ns  # type: ignore[operator]
    ttft_s, tpot_s = metrics.ttft_s(row), metrics.tpot_s(row)
    assert ttft_s is not None
    assert tpot_s is not None
    assert 0.1 <= ttft_s < 0.5
    assert 0.005 < tpot_s < 0.05
    assert (row.http_status, row.error_class, row.finish_reason) == (200, None, "stop")
    assert row.output_hash == output_hash(" w0 w1 w2 w3 w4 w5")
    assert row.details["connect_s"] > 0


async def test_four_tokens_a_chunk_leave_the_speed_as_it_is(scripted_server: Scripted) -> None:
    """The issue's acceptance: by n_out over time and by tpot, with both kinds of usage."""
    speeds: dict[tuple[int, str], tuple[float, float]] = {}
    for packed in (1, 4):
        for usage in ("continuous", "final"):
            scripted_server.configure(ttft_s=0.05, tpot_s=0.005, tokens_per_chunk=packed)
            async with endpoint(scripted_server, probe=usage == "continuous") as target:
                await target.connect()
                row, _ = await asked(target, max_tokens=60)
            assert row.n_chunks == 60 / packed
            assert row.chunk_n == ([packed] * row.n_chunks if usage == "continuous" else [])
            e2e_s, tpot_s = metrics.e2e_s(row), metrics.tpot_s(row)
            assert e2e_s is not None
            assert tpot_s is not None
            assert row.n_out == 60
            speeds[packed, usage] = (60 / e2e_s, 1 / tpot_s)
    for usage in ("continuous", "final"):
        packed, single = speeds[4, usage], speeds[1, usage]
        assert packed[0] == pytest.approx(single[0], rel=0.05)
        # Where the tokens of the first chunk are not known, 3 of 60 have no time.
        assert packed[1] == pytest.approx(single[1], rel=0.05 if usage == "continuous" else 0.1)
    assert speeds[4, "continuous"][1] == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(
    ("script", "error_class", "status", "says"),
    [
        ({"fail": {"status": 429, "retry_after_s": 1.5}}, "http_429", 429, "try again later"),
        ({"fail": {"status": 500}}, "http_500", 500, "try again later"),
        ({"refuse": ("temperature",)}, "http_400", 400, "Unrecognized request argument"),
        ({"drop_at": -1}, "connect", None, "closed the connection without an answer"),
        ({"drop_at": 0}, "protocol", 200, "broke off"),
        ({"drop_at": 3}, "protocol", 200, "broke off"),
        ({"error_event_at": 3}, "server", 200, "the engine died"),
        ({"broken": "json"}, "protocol", 200, "is not JSON"),
        ({"broken": "utf8"}, "protocol", 200, "is not UTF-8"),
        ({"broken": "shape"}, "protocol", 200, "has another shape"),
        ({"broken": "no_end"}, "protocol", 200, "without `finish_reason`"),
        ({"hang_at": 3}, "timeout", 200, "No whole answer within `0.25` s."),
    ],
)
async def test_an_error_is_a_row(
    scripted_server: Scripted, script: dict[str, Any], error_class: str, status: int, says: str
) -> None:
    scripted_server.configure(ttft_s=0.005, tpot_s=0.001, **script)
    timeout_s = 0.25 if "hang_at" in script else 10
    async with endpoint(scripted_server, timeout_s=timeout_s) as target:
        row, _ = await asked(target)
    assert (row.error_class, row.http_status) == (error_class, status)
    assert row.error is not None
    assert says in row.error
    assert row.t_sent_ns is not None
    assert row.retry_after_s == (1.5 if status == 429 else None)
    if script.keys() & {"error_event_at", "hang_at"} or script.get("drop_at") == 3:
        assert len(row.chunk_t_ns) == row.n_out == 3  # what came is kept
        assert row.count_source == "chunks"


async def test_an_error_spares_the_next(scripted_server: Scripted) -> None:
    scripted_server.configure(fail={"status": 503, "every": 2})
    async with endpoint(scripted_server) as target:
        classes = [(await asked(target))[0].error_class for _ in range(4)]
    assert classes == [None, "http_503", None, "http_503"]
    assert len({entry["connection"] for entry in scripted_server.log()}) == 1


async def test_a_missing_done_is_forgiven_where_the_reason_was_said(
    scripted_server: Scripted,
) -> None:
    scripted_server.configure(broken="no_done")
    async with endpoint(scripted_server) as target:
        row, _ = await asked(target)
    assert row.ok


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    target = Endpoint(f"http://127.0.0.1:{port}", model="m")
    row, _ = await asked(target)
    assert (row.error_class, row.http_status, row.t_sent_ns) == ("connect", None, None)
    await target.close()


async def test_who_is_cancelled_is_cut(scripted_server: Scripted) -> None:
    scripted_server.configure(ttft_s=0.01, tpot_s=0.01, num_tokens=1000)
    row, clock = Request(), Clock()
    async with endpoint(scripted_server) as target:
        task = asyncio.create_task(target.ask(Ask(prompt_id="1", prompt="x"), row, clock))
        async with asyncio.timeout(5):
            while not row.chunk_t_ns:  # noqa: ASYNC110 - a row tells nobody
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert row.error_class == "cut"
        assert row.t_done_ns is not None
        assert row.n_out == row.n_chunks >= 1
        async with asyncio.timeout(5):
            while not scripted_server.log()[0]["left"]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)


async def test_retries_wait_as_they_are_told(scripted_server: Scripted) -> None:
    scripted_server.configure(fail={"status": 429, "retry_after_s": 0.05, "first": 2})
    async with endpoint(scripted_server, retries=2) as target:
        row, reply = await asked(target)
    log = scripted_server.log()
    assert [entry["status"] for entry in log] == [429, 429, 200]
    received = [entry["t_received_ns"] for entry in log]
    assert min(received[1] - received[0], received[2] - received[1]) >= 0.05e9
    assert reply is not None
    assert (row.retries, row.http_status, row.retry_after_s) == (2, 200, 0.05)
    e2e_s = metrics.e2e_s(row)
    assert e2e_s is not None
    assert e2e_s > 0.1, "the row begins with the first sending"


async def test_retries_end(scripted_server: Scripted) -> None:
    scripted_server.configure(fail={"status": 503, "retry_after_s": 0})
    async with endpoint(scripted_server, retries=2) as target:
        row, _ = await asked(target)
    assert (row.error_class, row.retries, len(scripted_server.log())) == ("http_503", 2, 3)
    scripted_server.configure(fail={"status": 500, "retry_after_s": 0})
    async with endpoint(scripted_server, retries=2) as target:
        row, _ = await asked(target)
    assert (row.error_class, row.retries) == ("http_500", 0)


async def test_a_stale_connection_is_told(scripted_server: Scripted) -> None:
    scripted_server.configure(close_idle=True)
    async with endpoint(scripted_server) as target:
        first, second = (await asked(target))[0], (await asked(target))[0]
    assert first.ok
    assert second.ok
    assert "resent" not in first.details
    assert second.details["resent"] is True


async def test_a_key_is_sent_and_never_shown(scripted_server: Scripted) -> None:
    scripted_server.configure(api_key="right-key-123")
    async with endpoint(scripted_server, api_key="right-key-123") as target:
        assert (await asked(target))[0].ok
    async with endpoint(scripted_server, api_key="wrong-key-456") as target:
        row, _ = await asked(target)
    assert row.error_class == "http_401"
    assert row.error == "Incorrect API key provided: ***"
    assert b"wrong-key" not in msgspec.json.encode([row, target.arm])
    with pytest.raises(ConfigError, match="refuses the key") as caught:
        async with endpoint(scripted_server, api_key="wrong-key-456") as target:
            await target.connect()
    assert "wrong-key" not in str(caught.value)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENSTOCK_API_KEY", "OPENAI_API_KEY", "MINE"):
        monkeypatch.delenv(name, raising=False)
    assert api_key() is None
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    assert api_key() == "a"
    monkeypatch.setenv("PENSTOCK_API_KEY", "b")
    assert api_key() == "b"
    with pytest.raises(ConfigError, match="`MINE` is not set"):
        api_key("MINE")
    monkeypatch.setenv("MINE", "c")
    assert api_key("MINE") == "c"


async def test_reasoning_and_the_prefix_cache(scripted_server: Scripted) -> None:
    scripted_server.configure(reasoning_tokens=3, cached_tokens=1, ttft_s=0.01, tpot_s=0.002)
    async with endpoint(scripted_server) as target:
        row, reply = await asked(target)
        assert reply == Reply(text=" w3 w4 w5 w6 w7", reasoning=" w0 w1 w2", finish_reason="length")
        assert (row.n_out, row.n_reasoning, row.n_cached) == (8, 3, 1)
        assert row.t_first_ns == row.chunk_t_ns[0]
        assert row.t_first_visible_ns == row.chunk_t_ns[3]
        scripted_server.configure(reasoning_tokens=3, reasoning_field="reasoning")
        _, same = await asked(target)
        assert same == reply
        _, same = await asked(target, stream=False)
        assert same == reply


async def test_reasoning_that_is_not_shown(scripted_server: Scripted) -> None:
    scripted_server.configure(hidden_tokens=100, ttft_s=0.01, tpot_s=0.01)
    async with endpoint(scripted_server) as target:
        row, _ = await asked(target)
    assert (row.n_out, row.n_reasoning) == (108, 100)
    tpot_s = metrics.tpot_s(row)
    assert tpot_s is not None
    assert tpot_s > 0.005, "the hidden ones came before the first"


async def test_who_sends_no_usage(scripted_server: Scripted) -> None:
    scripted_server.configure(usage="none", tokens_per_chunk=4)
    async with endpoint(scripted_server) as target:
        row, _ = await asked(target)
    assert (row.n_out, row.count_source, row.n_in) == (2, "chunks", None)
    async with endpoint(scripted_server, count_tokens=lambda text: len(text.split())) as target:
        row, _ = await asked(target)
    assert (row.n_out, row.count_source) == (8, "tokenizer")


async def test_a_whole_answer_has_no_times_of_tokens(scripted_server: Scripted) -> None:
    async with endpoint(scripted_server) as target:
        for prompt in ("one two", [1, 2]):
            row, reply = await asked(target, stream=False, prompt=prompt)
            assert reply is not None
            assert reply.text == " w0 w1 w2 w3 w4 w5 w6 w7"
            assert (row.n_in, row.n_out, row.t_first_ns, row.n_chunks) == (2, 8, None, 0)
            assert row.t_done_ns is not None


async def test_the_dialect_follows_the_question(scripted_server: Scripted) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    async with endpoint(scripted_server) as target:
        await asked(target, prompt=[1, 2, 3])
        await asked(target, prompt=None, messages=messages)
        await asked(target, stop=["x"], seed=4, temperature=0.5, extra={"top_p": 0.9})
    completions, chat, prompt = scripted_server.log()
    assert (completions["path"], completions["body"]["prompt"]) == ("/v1/completions", [1, 2, 3])
    assert (chat["path"], chat["body"]["messages"]) == ("/v1/chat/completions", messages)
    assert prompt["body"] == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "one two"}],
        "max_tokens": 8,
        "temperature": 0.5,
        "seed": 4,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_p": 0.9,
    }


@pytest.mark.parametrize(
    ("dialect", "fields", "says"),
    [
        ("openai-completions", {"prompt": None, "messages": []}, "Messages cannot be sent"),
        ("openai-chat", {"prompt": [1]}, "Token ids cannot be sent"),
        ("tgi", {"prompt": [1]}, "Only text can be sent"),
        ("openai-chat", {"extra": {"x": object()}}, "TypeError"),
    ],
)
async def test_what_a_dialect_cannot_say(
    scripted_server: Scripted, dialect: str, fields: dict[str, Any], says: str
) -> None:
    async with endpoint(scripted_server, dialect=dialect) as target:
        row, clock = Request(), Clock()
        ask = Ask(
            **{"prompt_id": "1", "prompt": "x"} | {k: fields[k] for k in fields if k != "extra"}
        )
        if "extra" in fields:
            ask = msgspec.structs.replace(ask, extra={"x": fields["extra"]["x"]})
        assert await target.ask(ask, row, clock) is None
    assert row.error_class == "protocol"
    assert row.error is not None
    assert says in row.error
    assert scripted_server.log() == []


@pytest.mark.parametrize("stream", [True, False])
async def test_tgi(scripted_server: Scripted, stream: bool) -> None:
    async with endpoint(scripted_server, dialect="tgi") as target:
        row, reply = await asked(target, stream=stream, seed=3)
        assert reply == Reply(text=" w0 w1 w2 w3 w4 w5 w6 w7", finish_reason="length")
        assert (row.n_in, row.n_out, row.count_source) == (2, 8, "usage")
        assert row.chunk_n == ([1] * 8 if stream else [])
        parameters = {"details": True, "max_new_tokens": 8, "seed": 3}  # it refuses temperature 0
        assert scripted_server.log()[0]["body"] == {"inputs": "one two", "parameters": parameters}
        scripted_server.configure(error_event_at=2)
        failed, _ = await asked(target)
    assert (failed.error_class, failed.error, failed.n_out) == ("server", "the engine died", 2)


async def test_tgi_body(scripted_server: Scripted) -> None:
    async with endpoint(scripted_server, dialect="tgi") as target:
        await asked(target, temperature=0.5, stop=["x"], extra={"parameters": {"top_k": 3}})
    (entry,) = scripted_server.log()
    parameters = {"details": True, "max_new_tokens": 8, "temperature": 0.5, "do_sample": True}
    parameters |= {"stop": ["x"], "top_k": 3}
    assert entry["body"] == {"inputs": "one two", "parameters": parameters}


@pytest.mark.parametrize(
    ("url", "root", "base", "route", "shown"),
    [
        ("http://a:1", "", "/v1", None, "http://a:1"),
        ("http://a:1/", "", "/v1", None, "http://a:1/"),
        ("http://a:1/v1", "", "/v1", None, "http://a:1/v1"),
        ("https://a/openai/v1/", "/openai", "/openai/v1", None, "https://a/openai/v1/"),
        ("https://a/v1beta/openai", "", "/v1beta/openai", None, "https://a/v1beta/openai"),
        (
            "https://a/x/v1/chat/completions?key=secret",
            "/x",
            "/x/v1",
            "openai-chat",
            "https://a/x/v1/chat/completions",
        ),
        ("http://a/v1/completions", "", "/v1", "openai-completions", "http://a/v1/completions"),
        ("http://a/generate_stream", "", "/v1", "tgi", "http://a/generate_stream"),
    ],
)
def test_addresses(url: str, root: str, base: str, route: str | None, shown: str) -> None:
    found = address_of(url)
    assert (found.root, found.base, found.route, found.shown) == (root, base, route, shown)


def test_hash_of_a_prompt() -> None:
    ask = Ask(prompt_id="a", prompt="x", max_tokens=4)
    same = Ask(prompt_id="b", prompt="x", max_tokens=4, reference="y", stream=False)
    assert prompt_hash(ask) == prompt_hash(same)
    others: list[dict[str, Any]] = [
        {"prompt": "y"},
        {"max_tokens": 5},
        {"temperature": 0.1},
        {"seed": 0},
        {"stop": ["x"]},
        {"extra": {"top_p": 1}},
        {"fixed_length": True},
    ]
    hashes = {prompt_hash(msgspec.structs.replace(ask, **other)) for other in others}
    assert len(hashes | {prompt_hash(ask)}) == len(others) + 1


async def test_rate_limits_are_kept(scripted_server: Scripted) -> None:
    scripted_server.configure(headers={"x-ratelimit-remaining-requests": "9", "X-Other": "1"})
    async with endpoint(scripted_server) as target:
        row, _ = await asked(target)
    assert row.details["rate_limit"] == {"x-ratelimit-remaining-requests": "9"}

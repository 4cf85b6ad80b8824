"""Queue, cancellation, deadline, slow readers, engine death and drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from server_fakes import (
    FakeClient,
    Harness,
    Site,
    decode_stream,
    error_of,
    run_site,
    says,
    until,
)

from penstock.errors import InvalidField
from penstock.server.calls import Call
from penstock.server.settings import ServerSettings
from penstock.server.stream import EventStream

pytestmark = pytest.mark.anyio

Make = Callable[..., Harness]
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_a_full_queue(make_api: Make) -> None:
    """429 with the reason and when to come again; then there is room again."""
    engine = FakeClient(max_num_seqs=1)
    engine.hold_after = 0
    api = make_api(engine, max_queue=2)
    open_calls = [asyncio.create_task(api.chat()) for _ in range(3)]
    await until(lambda: len(engine.requests) == 3)
    response = await api.chat()
    assert response.status_code == 429
    assert error_of(response)["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    assert (await api.http.get("/ready")).status_code == 200
    engine.go.set()
    assert {(await call).status_code for call in open_calls} == {200}
    assert (await api.chat()).status_code == 200
    assert api.app.state.service.gate.num_open == 0


async def test_answers_count_in_the_queue(make_api: Make) -> None:
    engine = FakeClient(max_num_seqs=1)
    api = make_api(engine, max_queue=2)
    assert (await api.complete(["a"] * 3)).status_code == 200
    response = await api.complete(["a"] * 4)
    assert response.status_code == 400
    assert error_of(response)["param"] == "n"


async def test_prompt_tokens_count_in_the_queue(make_api: Make) -> None:
    engine = FakeClient()
    engine.hold_after = 0
    api = make_api(engine, max_queue_tokens=100)
    first = asyncio.create_task(api.complete("x" * 200))  # one alone always passes
    await until(lambda: len(engine.requests) == 1)
    response = await api.complete("y")
    assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
    engine.go.set()
    assert (await first).status_code == 200
    assert (await api.complete("y")).status_code == 200


async def test_refused_requests_hold_nothing(api: Harness) -> None:
    bodies: list[dict[str, Any]] = [{"max_tokens": 5000}, {"temperature": -1}, {"n": 1000}]
    for body in [*bodies, {"messages": []}]:
        assert (await api.chat(**body)).status_code == 400
    assert api.app.state.service.gate.num_open == 0


async def test_a_dead_engine(api: Harness) -> None:
    """Open requests and new ones learn the cause; /ready and /health turn 503."""
    api.engine.hold_after = 2
    whole = asyncio.create_task(api.chat())
    streamed = asyncio.create_task(api.stream_chat())
    several = asyncio.create_task(api.chat(n=2))
    await until(lambda: api.engine.num_read == 4 * 2)
    api.engine.die("killed by signal 9")
    response = await whole
    assert response.status_code == 503
    assert error_of(response)["code"] == "engine_dead"
    assert "killed by signal 9" in error_of(response)["message"]
    assert (await several).status_code == 503
    stream = await streamed
    assert not stream.done
    assert stream.events[-1]["error"]["code"] == "engine_dead"
    assert "killed by signal 9" in stream.events[-1]["error"]["message"]
    response = await api.chat()
    assert response.status_code == 503
    assert "retry-after" in response.headers
    for path in ("/ready", "/health"):
        response = await api.http.get(path)
        assert response.status_code == 503
        assert response.json() == {"status": "unavailable", "reason": "engine_dead"}


async def test_an_engine_that_does_not_step(make_api: Make) -> None:
    engine = FakeClient()
    engine.hold_after = 0
    api = make_api(engine, stall_timeout_s=0.05)
    assert (await api.http.get("/ready")).status_code == 200
    call = asyncio.create_task(api.chat())
    await until(lambda: len(engine.requests) == 1)
    await asyncio.sleep(0.06)
    response = await api.http.get("/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "engine_stalled")
    engine.stats.last_step_s = time.monotonic() + 100
    assert (await api.http.get("/ready")).status_code == 200
    engine.go.set()
    await call


async def test_who_leaves_a_hung_engine_does_not_mend_it(make_api: Make) -> None:
    engine = FakeClient()
    engine.hold_after, engine.is_hung = 0, True
    api = make_api(engine, stall_timeout_s=0.05)
    call = asyncio.create_task(api.chat())
    await until(lambda: len(engine.requests) == 1)
    call.cancel()
    await until(lambda: len(engine.aborted) == 1)
    await asyncio.sleep(0.06)
    response = await api.http.get("/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "engine_stalled")


async def test_a_stall_is_the_engines(make_api: Make) -> None:
    """A client that reads slowly holds a call open while the engine has nothing to do."""
    engine = FakeClient()
    engine.hold_after = 1
    api = make_api(engine, stall_timeout_s=0.01)
    streamed = asyncio.create_task(api.stream_chat())
    await until(lambda: engine.num_read == 1)
    await asyncio.sleep(0.02)
    assert (await api.http.get("/ready")).status_code == 200
    engine.stats.num_running = 1  # now it has
    engine.stats.last_step_s = time.monotonic() - 1
    assert (await api.http.get("/ready")).json()["reason"] == "engine_stalled"
    engine.stats.num_running, engine.stats.num_waiting = 0, 1
    assert (await api.http.get("/ready")).json()["reason"] == "engine_stalled"
    engine.go.set()
    await streamed


class _SlowTokenizer:
    """Takes until `go` for a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.started, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        self.started.set()
        assert self.go.wait(10)
        return self._tokenizer.encode(*args, **kwargs)

    decode = encode


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})]
)
async def test_calls_that_only_tokenize_are_watched(path: str, body: dict[str, Any]) -> None:
    """They end with the deadline, and when their client leaves."""
    api = Harness(FakeClient(), ServerSettings(request_timeout_s=0.05))
    slow = _SlowTokenizer(api.tokenizer)
    object.__setattr__(api.app.state.service, "tokenizer", slow)
    response = await api.post(path, **body)
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    slow.go.set()
    await api.close()
    async with run_site(FakeClient(), ServerSettings()) as site:
        slow = _SlowTokenizer(site.app.state.service.tokenizer)
        object.__setattr__(site.app.state.service, "tokenizer", slow)
        sock = await _send(site, body, path)
        await until(slow.started.is_set)
        sock.close()
        await until(lambda: b'outcome="client_gone"' in site.app.state.service.metrics.render())
        slow.go.set()


async def test_a_deadline(make_api: Make) -> None:
    engine = FakeClient()
    engine.hold_after = 1
    api = make_api(engine, request_timeout_s=0.05)
    response = await api.chat()
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    stream = await api.stream_chat()
    assert stream.events[-1]["error"]["code"] == "deadline_exceeded"
    assert not engine.live
    engine.go.set()
    assert (await api.chat()).status_code == 200


async def test_a_drain(api: Harness) -> None:
    """Nothing comes in; what is open ends; the rest is cut with a reason."""
    gate = api.app.state.service.gate
    api.engine.hold_after = 1
    streamed = asyncio.create_task(api.stream_chat())
    await until(lambda: len(api.engine.requests) == 1)
    drain = asyncio.create_task(gate.drain(5.0))
    await until(lambda: gate.draining)
    response = await api.http.get("/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "draining")
    assert (await api.http.get("/health")).status_code == 200
    response = await api.chat()
    assert (response.status_code, error_of(response)["code"]) == (503, "draining")
    assert "retry-after" in response.headers
    assert not drain.done()
    api.engine.go.set()
    assert (await streamed).done
    assert await drain == 0


async def test_a_drain_that_takes_too_long(api: Harness) -> None:
    gate = api.app.state.service.gate
    api.engine.hold_after = 1
    streamed = asyncio.create_task(api.stream_chat())
    whole = asyncio.create_task(api.chat())
    await until(lambda: api.engine.num_read == 2)
    assert await gate.drain(0.02) == 2
    stream = await streamed
    assert stream.events[-1]["error"]["code"] == "shutting_down"
    response = await whole
    assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")
    assert not api.engine.live


async def _send(site: Site, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """A request over a bare socket, whose end is ours to choose."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    sock = socket.create_connection(("127.0.0.1", site.port))
    await asyncio.to_thread(sock.sendall, head.encode() + data)
    return sock


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", [0, 3])
async def test_a_client_that_leaves(
    site: Site, engine: FakeClient, stream: bool, n: int, after: int
) -> None:
    """Its requests leave the engine at once, though no token comes: before the first, and later."""
    engine.hold_after = after
    sock = await _send(site, {**HI, "stream": stream, "n": n})
    wanted = n if after else 1  # the others wait for the first one's prompt
    await until(lambda: len(engine.live) == wanted)
    await asyncio.sleep(0.02)
    sock.close()
    await until(lambda: not engine.live)
    assert len(engine.aborted) == wanted
    await until(lambda: site.app.state.service.gate.num_open == 0)


async def test_a_client_that_leaves_while_its_text_is_tokenized(
    site: Site, engine: FakeClient
) -> None:
    service = site.app.state.service
    encode = type(service.template).encode
    started, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class SlowTemplate:
        def encode(self, *args: Any, **kwargs: Any) -> list[int]:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
            ids: list[int] = encode(service_template, *args, **kwargs)
            return ids

    service_template = service.template
    object.__setattr__(service, "template", SlowTemplate())
    sock = await _send(site, HI)
    await started.wait()
    sock.close()
    await until(lambda: service.gate.num_open == 0)
    go.set()
    assert not engine.requests


async def test_a_client_that_does_not_read() -> None:
    """The stream is cut, the engine's request freed, the connection gone."""
    # 24 kB an event: more in all than the kernel's buffers hold
    engine = FakeClient(lambda request: ([258] * 2000 for _ in range(400)))
    settings = ServerSettings(slow_reader_timeout_s=0.1)
    async with run_site(engine, settings) as site:
        with await _send(site, {**HI, "stream": True, "skip_special_tokens": False}) as sock:
            await until(lambda: bool(engine.requests))
            await until(lambda: not engine.live, 30)
            assert len(engine.aborted) == 1
            sock.settimeout(5)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while data := await asyncio.to_thread(sock.recv, 2**20):
                    received += data
            assert b"[DONE]" not in received
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(site.url + "/metrics")).text
        assert 'outcome="slow_reader"' in metrics


async def test_an_answer_that_nobody_reads() -> None:
    """Also one that is written whole is not kept for ever; who reads on gets it all."""
    settings = ServerSettings(slow_reader_timeout_s=0.3)
    async with run_site(FakeClient(), settings) as site:
        body = {"tokens": [258] * 1_000_000}  # 12 MB
        with await _send(site, body, "/detokenize"):
            await until(lambda: any(_num_unwritten(c) for c in site.connections), 30)
            await until(lambda: not site.connections, 30)
        with await _send(site, body, "/detokenize") as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            num_received = 0
            while num_received < 12_000_000:
                data = await loop.sock_recv(sock, 2**20)
                assert data
                num_received += len(data)


def _num_unwritten(connection: Any) -> int:
    size: int = connection.transport.get_write_buffer_size()
    return size


class _Unread:
    """Takes the head of an answer and one piece, then nothing more."""

    def __init__(self) -> None:
        self.num_taken = 0

    async def __call__(self, message: Any) -> None:
        if self.num_taken == 2:
            await asyncio.Event().wait()
        self.num_taken += 1


@pytest.mark.parametrize("error", [RuntimeError("x"), InvalidField("No.", field="n")])
async def test_an_error_object_that_nobody_reads(
    error: Exception,
) -> None:
    """The connection is cut; that it was is no error of ours."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise error

    call, aborts = Call("r", "POST", CHAT), []
    scope = {"extensions": {"penstock.abort": lambda: aborts.append(1)}}
    stream = EventStream(pieces(), lambda: None, ServerSettings(slow_reader_timeout_s=0.01))
    await stream.send_all(call, scope, _Unread())
    assert (call.outcome, aborts) == ("slow_reader", [1])


async def test_many_clients_at_once(site: Site, engine: FakeClient) -> None:
    """Each gets its own answer, and nothing is left over."""
    engine.script = lambda request: says(f"seed {request.params.seed}")(request)
    async with httpx.AsyncClient(timeout=30) as http:

        async def one(seed: int) -> str:
            body = {**HI, "seed": seed, "stream": seed % 2 == 0}
            response = await http.post(site.url + CHAT, json=body)
            assert response.status_code == 200
            if seed % 2:
                text: str = response.json()["choices"][0]["message"]["content"]
                return text
            events = decode_stream(response.content).events
            return "".join(e["choices"][0]["delta"].get("content", "") for e in events)

        answers = await asyncio.gather(*(one(seed) for seed in range(100)))
    assert answers == [f"seed {seed}" for seed in range(100)]
    assert not engine.live
    assert site.app.state.service.gate.num_open == 0

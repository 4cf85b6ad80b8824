"""Fakes of the server's tests: a byte tokenizer, a scripted engine, and a client for the app."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import uvicorn
from starlette.routing import Route

from penstock.errors import EngineDead
from penstock.protocol import sse
from penstock.server.app import create_app
from penstock.server.connection import bounded_protocol
from penstock.server.settings import ServerSettings
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer
from penstock.types import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    PoolingInfo,
    TokenEvent,
    TokenLogprobs,
    Usage,
)

SPECIAL = {256: "<s>", 257: "</s>", 258: "<|im_start|>", 259: "<|im_end|>"}
BOS, EOS = 256, 257
VOCAB = 260
CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.name %} ({{ m.name }}){% endif %}{% if mood %} [{{ mood }}]{% endif %}{{ '\\n' }}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteBackend:
    """A tokenizer library whose tokens are the 256 bytes and four special tokens."""

    vocab_size = VOCAB
    special_ids = frozenset(SPECIAL)
    drops_leading_space = False

    def piece(self, token_id: int) -> str | None:
        if token_id in SPECIAL:
            return SPECIAL[token_id]
        return f"<0x{token_id:02X}>" if 0 <= token_id < 256 else None

    def piece_bytes(self, token_id: int) -> bytes:
        if token_id in SPECIAL:
            return SPECIAL[token_id].encode()
        return bytes([token_id]) if 0 <= token_id < 256 else b""

    def piece_id(self, piece: str) -> int | None:
        return next((i for i in range(VOCAB) if self.piece(i) == piece), None)

    def encode(self, text: str, *, with_affixes: bool) -> list[int]:
        ids: list[int] = [BOS] if with_affixes else []
        while text:
            for token_id, special in SPECIAL.items():
                if text.startswith(special):
                    ids.append(token_id)
                    text = text[len(special) :]
                    break
            else:
                ids.extend(text[0].encode())
                text = text[1:]
        return ids

    def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        return list(text.encode())


def make_tokenizer() -> Tokenizer:
    return Tokenizer(
        ByteBackend(),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_templates={"default": TEMPLATE},
    )


def logprob_of(token_id: int) -> float:
    """Any fixed function that is not exact in decimal."""
    return -0.1 - (token_id % 7) / 3


def logprobs_of(token_id: int, top_k: int) -> TokenLogprobs:
    """Token 1 is the likeliest of all, then 2, ...; `token_id` may be among them or not."""
    top = tuple((i, -0.01 * i) for i in range(1, top_k + 1))
    listed = dict(top)
    return TokenLogprobs(token_id, listed.get(token_id, logprob_of(token_id)), 1, top)


Script = Callable[[EngineRequest], Iterable[Sequence[int]]]


def says(text: str, *, eos: bool = True) -> Script:
    """An engine that answers `text`, one byte a step, then ends."""
    tokens = [[byte] for byte in text.encode()]
    return lambda request: [*tokens, [EOS]] if eos else tokens


class FakeClient:
    """An engine that says what a script says, a list of tokens for every step.

    Attributes:
        requests: every request it got. live: ids that are open. aborted: ids closed before the end.
        hold_after: steps after which a request waits for `go`.
    """

    def __init__(self, script: Script | None = None, *, max_num_seqs: int = 8) -> None:
        self.script = script or says("Hello, wörld!")
        self.info = EngineInfo(
            model="fake",
            max_model_len=CONTEXT,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            dtype="float32",
            block_size=16,
            num_blocks=64,
            max_num_seqs=max_num_seqs,
        )
        self.stats = EngineStats(num_blocks=64)
        self.dead: EngineDead | None = None
        self.requests: list[EngineRequest] = []
        self.live: set[str] = set()
        self.owed: dict[str, float] = {}  # by request without a first event: since when
        self.num_read = 0  # events whose reader has asked for the next one
        self.aborted: list[str] = []
        self.hold_after: int | None = None
        self.go = asyncio.Event()
        self.error: Exception | None = None  # raised instead of the next step
        self.is_hung = False  # does not even take note of an abort
        self.raise_after = 0

    @property
    def owed_since_s(self) -> float:
        return min(self.owed.values(), default=time.monotonic())

    async def start(self) -> None:
        pass

    async def shutdown(self) -> None:
        pass

    def die(self, cause: str) -> None:
        self.dead = EngineDead(f"The engine has stopped: {cause}.")
        self.error = self.dead
        self.go.set()

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        self.live.add(request.request_id)
        self.owed[request.request_id] = time.monotonic()
        done = False
        try:
            num_generated = 0
            for step, token_ids in enumerate(self.script(request)):
                if self.hold_after is not None and step >= self.hold_after:
                    await self.go.wait()
                if self.error is not None and step >= self.raise_after:
                    raise self.error
                await asyncio.sleep(0)
                event = self._event(request, list(token_ids), num_generated, first=step == 0)
                num_generated = event.usage.num_generated_tokens
                done = event.finish is not None
                self.owed.pop(request.request_id, None)
                yield event
                self.num_read += 1
                if done:
                    return
        finally:
            self.live.discard(request.request_id)
            if not self.is_hung:
                self.owed.pop(request.request_id, None)
            if not done:
                self.aborted.append(request.request_id)

    def _event(
        self, request: EngineRequest, token_ids: list[int], num_before: int, *, first: bool
    ) -> TokenEvent:
        params, finish, stop_id = request.params, None, None
        stops = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
        for number, token_id in enumerate(token_ids):
            count = num_before + number + 1
            if token_id in stops and count > params.min_tokens:
                finish, stop_id = FinishReason.STOP, token_id
            elif count == params.max_tokens:
                finish = FinishReason.LENGTH
            if finish is not None:
                token_ids = token_ids[: number + 1]
                break
        prompt = request.prompt_token_ids
        about_prompt = None
        if first and params.prompt_logprobs is not None:
            about_prompt = [None, *(logprobs_of(i, params.prompt_logprobs) for i in prompt[1:])]
        return TokenEvent(
            request.request_id,
            token_ids,
            Usage(len(prompt), 3, num_before + len(token_ids), 0.25),
            finish,
            stop_id,
            None
            if params.logprobs is None
            else [logprobs_of(i, params.logprobs) for i in token_ids],
            about_prompt,
        )


def pooled_vector(token_ids: Sequence[int]) -> list[float]:
    """What a `PoolingClient` makes of a text: numbers that are exact in float32, of length 1."""
    angle = (len(token_ids), sum(token_ids) % 5, token_ids[0] % 3, 1)
    chosen = max(range(4), key=lambda i: (angle[i], i))
    vector = [0.0] * 4
    vector[chosen], vector[(chosen + sum(token_ids)) % 3] = 0.8, 0.6
    if sum(number * number for number in vector) < 0.9:
        vector[chosen] = 1.0
    return vector


class PoolingClient(FakeClient):
    """An engine that embeds, or with `labels` classifies, every text in one step."""

    def __init__(self, *, labels: tuple[str, ...] = (), **changes: Any) -> None:
        super().__init__(lambda request: [[]])
        pooling = PoolingInfo(
            kind="mean",
            size=len(labels) or 4,
            is_classifier=bool(labels),
            is_normalised=not labels,
            labels=labels,
            **changes,
        )
        self.info = dataclasses.replace(self.info, eos_token_ids=(), pooling=pooling)
        self.vector_of: Callable[[Sequence[int]], Sequence[float]] = pooled_vector

    def _event(
        self, request: EngineRequest, token_ids: list[int], num_before: int, *, first: bool
    ) -> TokenEvent:
        assert self.info.pooling is not None
        vector = self.vector_of(request.prompt_token_ids)[: self.info.pooling.size]
        usage = Usage(len(request.prompt_token_ids), 0, 0, 0.25)
        data = struct.pack(f"<{len(vector)}f", *vector)
        return TokenEvent(request.request_id, [], usage, FinishReason.STOP, vector=data)


class Streamed(NamedTuple):
    """A streamed answer."""

    status: int
    events: list[Any]  # decoded, without [DONE]
    done: bool


class Harness:
    """The application in memory, and a client of it."""

    def __init__(
        self,
        engine: FakeClient,
        settings: ServerSettings | None = None,
        *,
        honours_priority: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer or make_tokenizer()
        self.app = create_app(
            engine,
            self.tokenizer,
            ChatTemplate.for_tokenizer(self.tokenizer),
            settings or ServerSettings(),
            "fake",
            honours_priority=honours_priority,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://localhost"
        )

    @property
    def paths(self) -> list[str]:
        """Of all routes."""
        routes = [route for route in self.app.routes if isinstance(route, Route)]
        return [route.path.replace("{model:path}", "{model}") for route in routes]

    async def close(self) -> None:
        await self.http.aclose()
        self.app.state.service.workers.close()

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def chat(self, text: Any = "Hi", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return await self.post("/v1/chat/completions", **{"messages": messages, **body})

    async def complete(self, prompt: Any = "Hi", **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", prompt=prompt, **body)

    async def stream(self, path: str, **body: Any) -> Streamed:
        response = await self.post(path, stream=True, **body)
        if response.status_code != 200:
            return Streamed(response.status_code, [response.json()], False)
        return decode_stream(response.content)

    async def stream_chat(self, text: str = "Hi", **body: Any) -> Streamed:
        messages = [{"role": "user", "content": text}]
        return await self.stream("/v1/chat/completions", **{"messages": messages, **body})


def decode_stream(data: bytes) -> Streamed:
    events = [event.data for event in sse.Decoder().push(data)]
    done = bool(events) and events[-1] == sse.DONE_DATA
    return Streamed(200, [json.loads(data) for data in events if data != sse.DONE_DATA], done)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response that must have one."""
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert isinstance(error, dict)
    assert error["message"]
    return error


class Site(NamedTuple):
    """A server on a real socket."""

    engine: FakeClient
    url: str
    port: int
    app: Any
    connections: set[Any]  # uvicorn's protocols that are open


@asynccontextmanager
async def run_site(engine: FakeClient, settings: ServerSettings) -> AsyncIterator[Site]:
    """uvicorn in this event loop, as `penstock.server.run` sets it up."""
    app = Harness(engine, settings).app
    config = uvicorn.Config(
        app,
        port=0,
        http=bounded_protocol(settings),
        ws="none",
        loop="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn sets no event
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Site(engine, f"http://127.0.0.1:{port}", port, app, server.server_state.connections)
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that other tasks do."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it may be anything
            await asyncio.sleep(0.005)

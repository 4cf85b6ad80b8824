"""What holds for both clients, with an engine without a model and with a real tiny one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from helpers_fake_core import EXPLODE, FakeCore, make, tokens_of

import penstock
from penstock.engine.client import EngineClient, StreamingClient, ThreadClient, merge
from penstock.engine.config import EngineConfig
from penstock.engine.loop import Abort, Command, EngineLoop, Stop, Submit, Update
from penstock.engine.process import ProcessClient
from penstock.errors import (
    ConfigError,
    EngineDead,
    InvalidField,
    ModelLoadError,
    NotEnoughMemory,
    PenstockError,
    UnsupportedModel,
)
from penstock.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    Usage,
)

Client = ThreadClient | ProcessClient
MakeClient = Callable[[str], Client]


@pytest.fixture(params=["thread", "process"])
def make_client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeClient:
    """A client of either kind; the name of the model decides how loading goes."""
    # The child of a ProcessClient tests what the test imports.
    paths = (Path(penstock.__file__).parent.parent, Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))

    def make_one(model: str) -> Client:
        config = EngineConfig(model=model)
        if request.param == "thread":
            return ThreadClient(lambda: make(config))
        return ProcessClient(config, core="helpers_fake_core:make")

    return make_one


@contextlib.asynccontextmanager
async def running(client: Client) -> AsyncIterator[Client]:
    try:
        await client.start()
        yield client
    finally:
        await client.shutdown()


def drive(make_client: MakeClient, body: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), running(make_client("fake")) as client:
            await body(client)

    asyncio.run(main())


def ask(
    request_id: str, prompt: list[int], max_tokens: int | None = 5, **options: Any
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, **options),
    )


async def collect(client: EngineClient, request: EngineRequest) -> list[int]:
    token_ids: list[int] = []
    finish = None
    async for event in client.generate(request):
        assert finish is None, "an event after the last one"
        assert event.request_id == request.request_id
        token_ids += event.token_ids
        finish = event.finish
    assert finish is FinishReason.LENGTH
    return token_ids


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the client has no event for its figures
        await asyncio.sleep(0.001)


# --- one engine, any client ---


def test_200_requests_at_once(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        requests = [ask(f"r{i}", [i, i + 1], 1 + i % 17) for i in range(200)]
        answers = await asyncio.gather(*(collect(client, request) for request in requests))
        for i, answer in enumerate(answers):
            assert answer == tokens_of([i, i + 1], 1 + i % 17)
        assert client.stats.num_running == 0
        assert client.stats.num_steps < 200 * 17 / 2  # they did run together

    drive(make_client, body)


def test_every_field_survives_the_way(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        assert client.info.model == "fake"
        assert client.info.eos_token_ids == (2,)
        assert client.info.plan == ("weights: none",)
        assert client.info.startup_s["load"] == 0.5
        options = {
            "logit_bias": {5: 1.0},
            "allowed_token_ids": (1, 2),
            "logprobs": 1,
            "prompt_logprobs": 0,
            "seed": -(2**63),
            "stop": ("a",),
        }
        events = [event async for event in client.generate(ask("a", [4, 5], 3, **options))]
        first, last = events[0], events[-1]
        token_ids = tokens_of([4, 5], 3)
        assert first.prompt_logprobs == [None, TokenLogprobs(4, -1.0, 2)]
        found = [one for event in events for one in event.logprobs or []]
        assert found == [TokenLogprobs(i, -0.5, 1, ((i, -0.5),)) for i in token_ids]
        assert isinstance(found[0], TokenLogprobs)
        assert last.usage == Usage(2, 0, 3, 0.25)
        assert last.finish is FinishReason.LENGTH

    drive(make_client, body)


def test_a_refused_request_raises_and_others_go_on(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        other = asyncio.create_task(collect(client, ask("other", [3], 50)))
        for _ in range(2):  # its id is free again
            with pytest.raises(InvalidField, match="`prompt` is empty") as caught:
                await collect(client, ask("bad", []))
            assert caught.value.field == "prompt_token_ids"
            assert caught.value.hint == "say something"
        assert await other == tokens_of([3], 50)

    drive(make_client, body)


def test_an_id_in_use_is_refused(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        stream = client.generate(ask("a", [1], None))
        await anext(stream)
        for request_id in ("a", 5):  # the second is no string
            with pytest.raises(InvalidField) as caught:
                await collect(client, ask(request_id, [2]))  # type: ignore[arg-type]
            assert caught.value.field == "request_id"

    drive(make_client, body)


@pytest.mark.parametrize("how", ["aclose", "cancel", "break"])
def test_leaving_a_stream_aborts_it(make_client: MakeClient, how: str) -> None:
    async def body(client: Client) -> None:
        if how == "aclose":
            stream = client.generate(ask("a", [1], None))
            await anext(stream)
            await stream.aclose()
        elif how == "cancel":
            task = asyncio.create_task(collect(client, ask("a", [1], None)))
            await until(lambda: client.stats.num_running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async for _ in client.generate(ask("a", [1], None)):
                break
        await until(lambda: client.stats.num_running == 0)
        assert await collect(client, ask("b", [2])) == tokens_of([2], 5)

    drive(make_client, body)


def test_an_abandoned_id_gets_no_late_events(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        for i in range(100):
            stream = client.generate(ask("same", [i], None))
            await anext(stream)
            await stream.aclose()
            with contextlib.suppress(InvalidField):  # until the abort is through
                assert await collect(client, ask("same", [i + 500], 3)) == tokens_of([i + 500], 3)
            await until(lambda: client.stats.num_running == 0 and not client._streams)
            assert await collect(client, ask("same", [i + 300], 3)) == tokens_of([i + 300], 3)

    drive(make_client, body)


def test_a_slow_reader_gets_merged_events(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        events = []
        async for event in client.generate(ask("a", [1, 2], 40, logprobs=0)):
            events.append(event)
            if len(events) == 1:
                await until(lambda: client.stats.num_running == 0)
        assert len(events) < 40
        assert any(len(event.token_ids) > 1 for event in events)
        assert [i for event in events for i in event.token_ids] == tokens_of([1, 2], 40)
        for event in events:
            assert [one.token_id for one in event.logprobs or []] == event.token_ids
        assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].usage.num_generated_tokens == 40

    drive(make_client, body)


def test_merge_keeps_everything() -> None:
    one = TokenLogprobs(1, -0.1, 1)
    first = TokenEvent("a", [1], Usage(1, 0, 1, 0.0), prompt_logprobs=[None], logprobs=[one])
    second = TokenEvent("a", [2], Usage(1, 0, 2, 0.0), FinishReason.STOP, 2, logprobs=[one])
    assert merge(first, second) == TokenEvent(
        "a", [1, 2], Usage(1, 0, 2, 0.0), FinishReason.STOP, 2, [one, one], [None]
    )


def test_an_error_in_a_step_ends_every_request_with_its_cause(make_client: MakeClient) -> None:
    async def body(client: Client) -> None:
        assert client.dead is None
        tasks = [asyncio.create_task(collect(client, ask(f"r{i}", [i], None))) for i in range(8)]
        await until(lambda: client.stats.num_running == 8)
        with pytest.raises(EngineDead, match="`RuntimeError` in `_event`"):
            await collect(client, ask("bad", [EXPLODE]))
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, EngineDead) and "Runtime" in str(error) for error in errors)
        assert len({id(error) for error in errors}) == 8
        assert "RuntimeError" in str(client.dead)
        with pytest.raises(EngineDead, match="RuntimeError"):
            await collect(client, ask("late", [1]))

    drive(make_client, body)


class Mute(StreamingClient):
    """An engine that hears all and says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self._started(FakeCore(EngineConfig(model="ok")).info, EngineStats())

    def _send(self, command: Command) -> None:
        pass

    def say(self, token_ids: list[int], finish: FinishReason | None = None) -> None:
        event = TokenEvent("a", token_ids, Usage(1, 0, 1, 0.0), finish)
        self._update(Update([event], {}, EngineStats()))


def test_what_an_engine_owes() -> None:
    async def body() -> None:
        client = Mute()

        def owes() -> bool:
            before_s = client.owed_since_s
            time.sleep(0.001)
            return client.owed_since_s == before_s

        assert not owes()
        stream = client.generate(ask("a", [1], None))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert owes()
        client.say([5])
        assert not owes()  # who has had a token may take his time
        await first
        await stream.aclose()
        assert owes()  # the end, of which nobody will hear
        client.say([], FinishReason.ABORT)
        assert not owes()
        first = asyncio.ensure_future(anext(client.generate(ask("a", [1], None))))
        await asyncio.sleep(0)
        since_s = client.owed_since_s
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert client.owed_since_s == since_s  # to leave unanswered makes no younger debt

    asyncio.run(body())


def test_an_idle_engine_that_can_serve_no_more_says_so() -> None:
    """As when another rank dies: nobody has to ask first."""

    def core() -> FakeCore:
        made = FakeCore(EngineConfig(model="ok"))

        def fail() -> None:
            raise EngineDead("Rank `1` is gone.")

        made.on_check = fail
        return made

    async def body() -> None:
        client = ThreadClient(core)
        await client.start()
        await until(lambda: client.dead is not None)
        assert "Rank `1` is gone." in str(client.dead)
        await client.shutdown()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("model", "kind", "text", "hint"),
    [
        ("bad-config", ConfigError, "`block_size` is `0`.", "use 16"),
        ("no-model", ModelLoadError, "`x` is no checkpoint.", None),
        ("unsupported", UnsupportedModel, "`FooForCausalLM` is not known.", "known: `Llama`"),
        ("no-memory", NotEnoughMemory, "`9` GiB are missing.", "lower `max_model_len`"),
    ],
)
def test_start_raises_what_loading_raises(
    make_client: MakeClient, model: str, kind: type[PenstockError], text: str, hint: str | None
) -> None:
    async def main() -> None:
        client = make_client(model)
        with pytest.raises(kind) as caught:
            await client.start()
        assert type(caught.value) is kind
        assert (caught.value.message, caught.value.hint) == (text, hint)
        assert client.dead is not None
        await client.shutdown()

    asyncio.run(main())


def test_before_start_and_after_shutdown(make_client: MakeClient) -> None:
    async def main() -> None:
        client = make_client("fake")
        assert "not started" in str(client.dead)
        with pytest.raises(EngineDead, match="not started"):
            await collect(client, ask("early", [1]))
        await client.start()
        assert client.dead is None
        task = asyncio.create_task(collect(client, ask("a", [1], None)))
        await until(lambda: client.stats.num_running == 1)
        await asyncio.gather(client.shutdown(), client.shutdown())
        await client.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await task
        with pytest.raises(EngineDead, match="shut down"):
            await collect(client, ask("late", [1]))

    asyncio.run(main())


def test_shutdown_without_start(make_client: MakeClient) -> None:
    asyncio.run(make_client("fake").shutdown())


def test_start_after_shutdown_is_refused(make_client: MakeClient) -> None:
    async def main() -> None:
        client = make_client("fake")
        await client.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await client.start()
        with pytest.raises(EngineDead, match="shut down"):
            await collect(client, ask("late", [1]))
        await client.shutdown()

    asyncio.run(main())


def test_a_thread_that_is_shut_down_while_it_loads_never_serves() -> None:
    loads, goes_on = threading.Event(), threading.Event()

    def make_slowly() -> FakeCore:
        loads.set()
        assert goes_on.wait(30)
        return make(EngineConfig(model="fake"))

    async def main() -> None:
        client = ThreadClient(make_slowly)
        start = asyncio.create_task(client.start())
        await until(loads.is_set)
        shutdown = asyncio.create_task(client.shutdown())
        with pytest.raises(EngineDead, match="shut down"):
            await start  # while it still loads
        goes_on.set()
        await shutdown
        await asyncio.sleep(0)  # what the thread posted is done
        with pytest.raises(EngineDead, match="shut down"):
            await collect(client, ask("late", [1]))
        assert client._thread is not None
        assert not client._thread.is_alive()

    async def limited() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(limited())


def test_a_cancelled_start_can_be_shut_down(make_client: MakeClient) -> None:
    async def main() -> None:
        client = make_client("fake")
        task = asyncio.create_task(client.start())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.shutdown()

    asyncio.run(main())


def test_clients_import_without_torch() -> None:
    code = (
        "import sys, penstock.engine.client, penstock.engine.process; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the loop by itself ---


def test_an_abort_before_a_step_is_done_before_it() -> None:
    updates: list[Update] = []
    loop = EngineLoop(updates.append)

    def on_step() -> None:
        match len(core.stepped):
            case 3:
                loop.send(Abort("a"))
            case 5:
                loop.send(Submit(ask("c", [3], None)))
                loop.send(Abort("c"))
                loop.send(Abort("nobody"))
            case 6:
                loop.send(Stop())

    core = FakeCore(EngineConfig(model="fake"), on_step)
    loop.send(Submit(ask("a", [1], None)))
    loop.send(Submit(ask("b", [2], None)))
    loop.run(core)
    assert core.stepped == [["a", "b"]] * 3 + [["b"]] * 3
    ends = [event for update in updates for event in update.events if event.finish is not None]
    assert [(event.request_id, event.finish) for event in ends] == [
        ("a", FinishReason.ABORT),
        ("c", FinishReason.ABORT),
    ]
    assert len(updates) == 6  # one a step, for the whole batch
    assert [update.stats.num_running for update in updates] == [2, 2, 2, 1, 1, 1]

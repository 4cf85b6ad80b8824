"""The engine in this process answers as the server does, and its rows hold the same counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.engines.arms import parse_arm
from penstock.measure.engines.launcher import launched
from penstock.measure.load.target import Ask, Reply, Target
from penstock.measure.offline import InProcess, config_of
from penstock.measure.records import Clock, Request

pytestmark = pytest.mark.anyio
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
ASKS = [
    Ask(prompt_id="text", prompt="The river is", max_tokens=12),
    Ask(prompt_id="ids", prompt=[7, 70, 300, 41] * 8, max_tokens=9, fixed_length=True),
    Ask(prompt_id="chat", messages=QUESTION, max_tokens=20),
    Ask(prompt_id="stop", prompt="The river is", max_tokens=20, stop=["e"]),
    Ask(prompt_id="sampled", prompt="Once", max_tokens=10, temperature=0.8, seed=5),
    Ask(prompt_id="refused", prompt="Once", max_tokens=10, temperature=-1.0),
    Ask(prompt_id="extra", prompt=[5, 6], max_tokens=3, extra={"presence_penalty": 1.5}),
]
SAME = ("n_in", "n_cached", "n_out", "finish_reason", "prompt_hash", "output_hash", "error_class")


async def ask_all(target: Target) -> list[tuple[Request, Reply | None]]:
    clock = Clock()
    made = []
    for ask in ASKS:
        row = Request()
        made.append((row, await target.ask(ask, row, clock)))
    return made


async def both(tmp_path: Path, use: Callable[[Target], Awaitable[object]]) -> list[object]:
    made = []
    for text in ("penstock:brook?num_threads=1", "inprocess:brook?num_threads=1"):
        async with launched(parse_arm(text), log_dir=tmp_path) as running:
            made.append(await use(running.target))
    return made


async def test_texts_and_counts_are_those_of_the_server(tmp_path: Path) -> None:
    over_http, in_process = await both(tmp_path, ask_all)
    assert isinstance(over_http, list)
    assert isinstance(in_process, list)
    for (theirs, their_reply), (ours, our_reply) in zip(over_http, in_process, strict=True):
        for name in SAME:
            assert getattr(theirs, name) == getattr(ours, name), (ours.prompt_id, name)
        assert their_reply == our_reply
        if ours.ok:
            assert ours.count_source == "usage"
            assert ours.n_out
            assert sum(ours.chunk_n) == ours.n_out
            assert len(ours.chunk_t_ns) == len(ours.chunk_n) == ours.n_chunks
            times = [ours.t_sent_ns, *ours.chunk_t_ns, ours.t_done_ns]
            assert times == sorted(times)
            assert (ours.t_first_ns, ours.t_last_ns) == (ours.chunk_t_ns[0], ours.chunk_t_ns[-1])
    refused = next(row for row, _ in in_process if row.prompt_id == "refused")
    assert refused.error_class == "http_400"
    assert "temperature" in refused.error
    assert (refused.n_in, refused.n_out, refused.count_source) == (None, None, "none")


async def test_what_only_a_server_knows_is_an_error_and_a_cancelled_request_is_cut() -> None:
    target = InProcess.of("brook", {"num_threads": "1"})
    await target.start()
    try:
        clock, row = Clock(), Request()
        odd = Ask(prompt_id="1", prompt="a", extra={"top_a": 1})
        assert await target.ask(odd, row, clock) is None
        assert row.error_class == "http_400"
        assert "top_a" in (row.error or "")
        row = Request()
        long = Ask(prompt_id="2", prompt="a", max_tokens=1500, fixed_length=True)
        task = asyncio.create_task(target.ask(long, row, clock))
        while row.t_first_ns is None:  # noqa: ASYNC110 - only the row tells
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert row.error_class == "cut"
        assert row.t_done_ns is not None
        assert not row.ok
    finally:
        await target.close()


async def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    target = InProcess.of("brook", {"num_threads": "1"}, timeout_s=0.05)
    await target.start()
    try:
        row = Request()
        long = Ask(prompt_id="2", prompt="a", max_tokens=900, fixed_length=True)
        assert await target.ask(long, row, Clock()) is None
        assert (row.error_class, row.error) == ("timeout", "No whole answer within `0.05` s.")
        assert row.t_done_ns is not None
    finally:
        await target.close()


def test_options_are_those_of_the_engine() -> None:
    told = {"num_threads": "2", "enforce_eager": None, "quantization": "int8"}
    config = config_of("brook", told | {"enable-prefix-caching": "false"})
    assert (config.num_threads, config.enforce_eager) == (2, True)
    assert (config.quantization, config.enable_prefix_caching) == ("int8", False)
    for name, value, says in (
        ("num_thread", "2", "has no option `num_thread`"),
        ("num_threads", "two", "must be a number"),
        ("num_threads", None, "needs a value"),
        ("enforce_eager", "maybe", "`true` or `false`"),
        ("quantization", "int3", "`quantization` is `int3`"),
    ):
        with pytest.raises(ConfigError, match=says):
            config_of("brook", {name: value})

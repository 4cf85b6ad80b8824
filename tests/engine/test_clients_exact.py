"""The real engine behind both clients answers what a naive uncached loop answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers_tiny import Oracle
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.engine.client import ThreadClient
from penstock.engine.config import EngineConfig
from penstock.engine.process import ProcessClient
from penstock.types import (
    EngineRequest,
    FinishReason,
    SamplingParams,
)

Client = ThreadClient | ProcessClient


class Ask(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None  # events; with 0 it is aborted whatever the engine's pace
    delay_s: float


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    shared = [7, 3, 9, 30, 2, 51, 8, 11, 12, 40]
    prompt = shared[: draw(st.integers(0, 10))] + draw(
        st.lists(st.integers(0, 59), min_size=1, max_size=12)
    )
    greedy = draw(st.booleans())
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 16)),
        temperature=0.0 if greedy else 0.8,
        top_k=draw(st.sampled_from([0, 10])),
        seed=draw(st.integers(0, 1000)),
    )
    abort_after = draw(st.none() | st.none() | st.integers(1, 3))
    return Ask(prompt, params, abort_after, draw(st.sampled_from([0.0, 0.0005, 0.002])))


# Block size, tokens a step, prefix cache: each value of each is seen, by both clients.
SHAPES = [(1, 7, True), (3, 1000, False), (16, 1, True)]
CONTEXT = 64


async def answer(
    client: Client, request_id: str, one: Ask, totals: Counter[str]
) -> tuple[list[int], FinishReason | None]:
    token_ids: list[int] = []
    request = EngineRequest(request_id=request_id, prompt_token_ids=one.prompt, params=one.params)
    await asyncio.sleep(one.delay_s)
    num_events, finish = 0, None
    if one.abort_after == 0:
        first = asyncio.ensure_future(anext(aiter(client.generate(request))))
        await asyncio.sleep(0)  # it is sent now, and cannot have been answered
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        totals["aborts"] += 1
        return token_ids, finish
    async for event in client.generate(request):
        token_ids += event.token_ids
        num_events, finish = num_events + 1, event.finish
        if num_events == one.abort_after and finish is None:
            totals["aborts"] += 1
            break
    return token_ids, finish


def check_answers(
    runner: asyncio.Runner, client: Client, oracle: Oracle, totals: Counter[str]
) -> None:
    """Random requests through one client."""

    async def all_answers(batch: list[Ask]) -> list[tuple[list[int], FinishReason | None]]:
        totals["batches"] += 1
        names = [f"{totals['batches']}-{i}" for i in range(len(batch))]
        return await asyncio.gather(
            *(answer(client, name, one, totals) for name, one in zip(names, batch, strict=True))
        )

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(asks(), min_size=1, max_size=8))
    @example([Ask([i] * 20, SamplingParams(max_tokens=24, seed=i), None, 0.0) for i in range(6)])
    @example([Ask([1, 2], SamplingParams(max_tokens=9, seed=0), after, 0.0) for after in (0, None)])
    def check(batch: list[Ask]) -> None:
        for one, (found, finish) in zip(batch, runner.run(all_answers(batch)), strict=True):
            assert one.params.seed is not None
            expected = oracle.generate(one.prompt, one.params, one.params.seed, CONTEXT, found)
            if finish is None:
                assert found == expected.token_ids[: len(found)]
            else:
                assert (found, finish) == (expected.token_ids, expected.finish)
            totals["answers"] += 1

    check()
    stats = client.stats
    totals["preemptions"] += stats.num_preemptions
    totals["hits"] += stats.num_prefix_hit_tokens
    totals["chunks"] += stats.num_chunks
    assert client.dead is None


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_tokens_equal_the_naive_loop(kind: str, checkpoint: Path, oracle: Oracle) -> None:
    totals: Counter[str] = Counter()
    for block_size, budget, is_cached in SHAPES:
        config = EngineConfig(
            model=str(checkpoint),
            block_size=block_size,
            num_blocks=72 // block_size + 1,  # little more than one request at full length
            max_num_seqs=6,
            max_num_batched_tokens=budget,
            enable_prefix_caching=is_cached,
            num_threads=1,
        )
        client = ThreadClient(config) if kind == "thread" else ProcessClient(config)
        with asyncio.Runner() as runner:
            runner.run(client.start())
            check_answers(runner, client, oracle, totals)
            runner.run(client.shutdown())
        if not is_cached:
            assert client.stats.num_prefix_hit_tokens == 0
    assert totals["answers"] > 50
    for what in ("aborts", "preemptions", "hits", "chunks"):
        assert totals[what] > 0, what

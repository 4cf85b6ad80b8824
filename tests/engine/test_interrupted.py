"""A step that is cut off anywhere (Ctrl-C, an error) costs time, but never a wrong token."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from types import FrameType
from typing import Any, cast

import pytest
from helpers_scheduler import VOCAB_SIZE, FakeRunner, expected_events
from helpers_tiny import EOS, VOCAB, Cut, Oracle, TinyModel, cut_at, run

from penstock.engine import kv_cache, request, scheduler
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.types import EngineInfo, EngineRequest, SamplingParams, TokenEvent

PROMPT = [(7 * i + 3) % EOS for i in range(24)]


def greedy(request_id: str, prompt: list[int], max_tokens: int, **params: Any) -> EngineRequest:
    params = {"temperature": 0.0, "ignore_eos": True, "seed": 0} | params
    asked = SamplingParams(max_tokens=max_tokens, **params)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=asked)


# -- the model -----------------------------------------------------------------------------------


def test_the_same_prompt_after_ctrl_c(tiny: TinyModel, oracle: Oracle) -> None:
    """Its prefix was offered to the cache when the step was planned, and never computed."""
    core = tiny.core(block_size=4)
    asked = greedy("a", PROMPT, 8)
    core.add(other := greedy("b", [1, 2, 3], 8))
    core.step()
    core.abort(other.request_id)
    cut_at(core, [1])
    core.add(asked)
    with pytest.raises(Cut):
        core.step()
    core.scheduler.check()
    assert (core.stats.num_running, core.stats.num_waiting) == (0, 1)
    assert core.stats.num_used_blocks == 0
    core.abort("a")
    output = run(core, [asked])["a"]
    assert output.token_ids == oracle.generate(PROMPT, asked.params, 0, 64).token_ids
    assert output.usage is not None
    assert output.usage.num_cached_tokens == 0


def test_cut_at_every_layer_of_every_step(tiny: TinyModel, oracle: Oracle) -> None:
    """Chunks, shared prefixes, preemptions and rows that were just released, in every phase."""
    requests = [
        greedy("0", PROMPT[:13], 4),
        greedy("1", PROMPT[:17], 5, prompt_logprobs=0, logprobs=0),
        greedy("2", PROMPT[:13], 3),
        greedy("3", PROMPT[5:9], 6),
    ]
    wanted = {
        asked.request_id: oracle.generate(asked.prompt_token_ids, asked.params, 0, VOCAB).token_ids
        for asked in requests
    }
    arrivals = {"3": 2}
    seen: Counter[str] = Counter()
    point = 0
    while seen["cuts"] == point:  # the run before did reach its point
        core = tiny.core(
            max_model_len=28,
            block_size=3,
            num_blocks=12,
            max_num_seqs=3,
            max_num_batched_tokens=20,
            long_prefill_token_threshold=8,
        )
        cuts: list[None] = []
        outputs = run(
            core,
            requests,
            arrivals=arrivals,
            cuts=[point, point + 9],  # and again soon after, when the requests come back
            on_cut=partial(cuts.append, None),
        )
        for request_id, output in outputs.items():
            assert output.token_ids == wanted[request_id], (point, request_id)
            assert (output.prompt_logprobs is None) == (request_id != "1")
        assert len(outputs["1"].logprobs) == 5
        seen["preemptions"] += core.stats.num_preemptions
        seen["hits"] += core.stats.num_prefix_hit_tokens
        seen["chunks"] += core.stats.num_chunks
        seen["cuts"] += bool(cuts)
        point += 1
    assert point > 60
    assert min(seen["hits"], seen["chunks"]) > point
    assert core.stats.num_preemptions > 0, "also in the last run, which was not cut"


# -- the bookkeeping -----------------------------------------------------------------------------


class CutAtLine:
    """A trace function that raises `Cut` at the n-th line that runs in the files around a step."""

    FILES = frozenset(
        {str(module.__file__) for module in (scheduler, kv_cache, request)}
        | {FakeRunner.execute.__code__.co_filename}
    )

    def __init__(self, num_lines: int) -> None:
        self.num_left = num_lines
        self.where = ""
        self.has_result = False  # the step's tokens are being handed out

    def __call__(self, frame: FrameType, event: str, arg: object) -> CutAtLine | None:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if frame.f_code.co_qualname == "Scheduler.commit":
            self.has_result = True
        if event == "line":
            self.num_left -= 1
            if self.num_left == 0:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise Cut
        return self


def fake_core(depth: int) -> tuple[EngineCore, FakeRunner]:
    config = EngineConfig(
        model="fake",
        max_num_seqs=3,
        max_num_batched_tokens=10,
        long_prefill_token_threshold=7,
    )
    info = EngineInfo(
        model="fake",
        max_model_len=20,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(),
        dtype="none",
        block_size=3,
        num_blocks=9,
        max_num_seqs=3,
    )
    runner = FakeRunner(info.num_blocks, info.block_size, depth)
    return EngineCore(config, info, cast("Any", runner)), runner


def play(depth: int, cut_step: int, num_lines: int, seen: Counter[str]) -> str:
    """Cut step `cut_step` at its n-th line and go on to the end; where it was, "" if behind it."""
    core, runner = fake_core(depth)
    prompt = [token_id % VOCAB_SIZE for token_id in range(3, 20)]
    live = {}
    for number, (num_prompt, max_tokens) in enumerate([(11, 6), (13, 4), (4, 9), (10, 40)]):
        core.add(greedy(str(number), prompt[:num_prompt], max_tokens, seed=number))
        live[str(number)] = core.scheduler._requests[str(number)]
    tracer = CutAtLine(num_lines)
    events: list[TokenEvent] = []
    for step in range(200):
        if not core.has_work:
            break
        before = sys.gettrace()
        if step == cut_step:
            sys.settrace(tracer)
        try:
            events += core.step()
        except Cut:
            runner.was_cut = True
            seen["cuts"] += 1
        finally:
            sys.settrace(before)
        core.scheduler.check()
    assert not core.has_work
    assert core.stats.num_used_blocks == 0
    for request_id, one in live.items():
        token_ids = [t for event in events if event.request_id == request_id for t in event[1]]
        expected, reason = expected_events(one, 20)
        generated = one.token_ids[one.num_prompt :]
        # A request that ended in the step that was cut may lack its last token: it is gone.
        assert generated in (expected, expected[:-1]), tracer.where
        assert generated == expected or tracer.has_result, tracer.where
        if not (tracer.where and tracer.has_result):
            assert token_ids == expected, tracer.where
            finishes = [event.finish for event in events if event.request_id == request_id]
            assert finishes[-1] is reason
    seen["preemptions"] += core.stats.num_preemptions
    seen["hits"] += core.stats.num_prefix_hit_tokens
    seen["lost"] += bool(tracer.where) and tracer.has_result
    return tracer.where


def test_a_cut_is_counted_as_preemption(tiny: TinyModel) -> None:
    core = tiny.core(block_size=4)
    core.add(greedy("a", PROMPT, 8))
    core.step()
    assert (core.stats.num_running, core.stats.num_used_blocks) == (1, 6)
    cut_at(core, [0])
    with pytest.raises(Cut):
        core.step()
    assert (core.stats.num_running, core.stats.num_waiting) == (0, 1)
    assert (core.stats.num_used_blocks, core.stats.num_preemptions) == (0, 1)
    assert core.scheduler._requests["a"].num_preemptions == 1


@pytest.mark.parametrize("cut_step", [0, 1, 3, 4, 6, 10])  # three of them end a request; as read
@pytest.mark.parametrize("depth", [0, 1])
def test_cut_at_every_line_of_a_step(cut_step: int, depth: int) -> None:
    seen: Counter[str] = Counter()
    places = set()
    num_lines = 1
    while place := play(depth, cut_step + depth, num_lines, seen):
        places.add(place.split(":")[0])
        num_lines += 1
    assert places >= {"Scheduler.schedule", "FakeRunner.execute", "Scheduler.commit"}
    assert seen["cuts"] == num_lines - 1 > 50
    assert min(seen["preemptions"], seen["hits"], seen["lost"]) > 0

"""`Scheduler`: whatever the plans are, the tokens must be the same; and each rule by itself."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers_scheduler import VOCAB_SIZE, Engine, check_events
from hypothesis import example, given, settings

from penstock.engine.plan import Slice, StepResult
from penstock.engine.policy import POLICIES
from penstock.engine.request import Request
from penstock.errors import ConfigError
from penstock.types import EngineRequest, EngineStats, FinishReason, SamplingParams, Usage

# -- everything at once ----------------------------------------------------------------------------

ENGINES = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 3, 16]),
        "num_spare_blocks": st.integers(0, 6),
        "budget": st.sampled_from([1, 7, 64]),
        "chunk": st.sampled_from([0, 0, 3]),
        "rows": st.sampled_from([1, 4, 8]),
        "caching": st.booleans(),
        "policy": st.sampled_from(sorted(POLICIES)),
        "depth": st.sampled_from([0, 1, 2]),
    }
)
MAX_MODEL_LEN = 40
PREFIX = [token_id % VOCAB_SIZE for token_id in range(3, 3 + MAX_MODEL_LEN)]
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "arrival_step": st.integers(0, 8),
            "num_shared": st.integers(0, 32),
            "tail": st.lists(st.integers(1, 3), min_size=1, max_size=5),
            "priority": st.integers(0, 2),
            "salt": st.sampled_from(["", "", "tenant"]),
            "max_tokens": st.integers(1, 36) | st.none(),
            "min_tokens": st.just(0) | st.just(1),
            "ignore_eos": st.booleans(),
            "logprobs": st.none() | st.just(0),
            "prompt_logprobs": st.sampled_from([None, None, None, 0]),
            "abort": st.none()
            | st.none()
            | st.tuples(st.integers(0, 20), st.sampled_from(["before", "planned", "executed"])),
        }
    ),
    min_size=1,
    max_size=10,
)

seen: Counter[str] = Counter()


def play(setting: dict[str, Any], asked: list[dict[str, Any]]) -> Engine:
    """Add and abort what was drawn at its step, and step until all is done."""
    setting = dict(setting)
    num_blocks = -(-MAX_MODEL_LEN // setting["block_size"]) + setting.pop("num_spare_blocks")
    engine = Engine(num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, **setting)
    asked = sorted(asked, key=lambda item: item["arrival_step"])
    ids: list[str] = []
    num_unserved = 0  # steps since the oldest was served
    last_oldest = ""
    for step in itertools.count():
        while len(ids) < len(asked) and asked[len(ids)]["arrival_step"] <= step:
            item = dict(asked[len(ids)])
            prompt = PREFIX[: item.pop("num_shared")] + item.pop("tail")
            del item["arrival_step"], item["abort"]
            ids.append(engine.add(prompt, **item).id)
        aborts: dict[str, list[str]] = {"before": [], "planned": [], "executed": []}
        for request_id, item in zip(ids, asked, strict=False):
            if item["abort"] is not None and item["arrival_step"] + item["abort"][0] == step:
                aborts[item["abort"][1]].append(request_id)
        for request_id in aborts["before"]:
            engine.abort(request_id)
        oldest = min(engine.scheduler._requests.values(), key=lambda r: r.arrival, default=None)
        before = (oldest.num_preemptions, oldest.num_computed) if oldest else (0, 0)
        ends = oldest is not None and oldest.will_end(MAX_MODEL_LEN)
        # It was preempted before it was the oldest, and what it needs is known when that is read.
        is_unread = oldest is not None and oldest.row is None and oldest.num_in_flight > 0
        was_in_flight = bool(engine.in_flight)
        plan = engine.step(tuple(aborts["planned"]), tuple(aborts["executed"]))
        if oldest is not None:
            assert plan.slices or was_in_flight
            aborted = itertools.chain.from_iterable(aborts.values())
            if setting["policy"] == "fcfs" and oldest.id not in aborted:
                # Nobody starves: the oldest is served in each step, and never preempted.
                assert oldest.num_preemptions == before[0]
                # Steps count for the same oldest alone, and not those in which it only ends.
                is_served = ends or oldest.num_computed > before[1]
                so_far = num_unserved if oldest.id == last_oldest else 0
                num_unserved = 0 if is_served else so_far + 1
                last_oldest = oldest.id
                assert num_unserved == 0 or (is_unread and num_unserved < setting["depth"])
                seen["unread"] += is_unread
            else:
                num_unserved = 0
        seen["in_flight"] += len(engine.in_flight)
        seen["wasted"] += sum(
            request.row is None for planned in engine.scheduler._planned for request in planned
        )
        if not engine.scheduler.has_work and not engine.in_flight and len(ids) == len(asked):
            break
    return engine


def ask(num_shared: int, last: int, max_tokens: int | None) -> dict[str, Any]:
    """A request of `REQUESTS`: a part of the prefix and one token more."""
    draw: dict[str, Any] = dict.fromkeys(("logprobs", "prompt_logprobs", "abort"))
    draw |= {"arrival_step": 0, "priority": 0, "salt": "", "min_tokens": 0, "ignore_eos": False}
    return draw | {"num_shared": num_shared, "tail": [last], "max_tokens": max_tokens}


@settings(max_examples=150)
@given(setting=ENGINES, asked=REQUESTS)
@example(  # the third is preempted, and is the oldest before its two tokens in flight are read
    setting={
        "block_size": 1,
        "num_spare_blocks": 0,
        "budget": 64,
        "chunk": 0,
        "rows": 4,
        "caching": False,
        "policy": "fcfs",
        "depth": 2,
    },
    asked=[ask(0, 1, 1), ask(0, 1, 1), ask(3, 2, None), ask(12, 1, None)],
)
def check_all(setting: dict[str, Any], asked: list[dict[str, Any]]) -> None:
    engine = play(setting, asked)
    for request in engine.requests.values():
        check_events(request, engine.events[request.id], MAX_MODEL_LEN)
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_prefix_hit_tokens <= stats.num_prefix_query_tokens
    for event in ("num_preemptions", "num_chunks", "num_prefix_hit_tokens"):
        seen[event] += getattr(stats, event)
    seen["blocked"] += engine.num_blocked
    last = [events[-1] for events in engine.events.values()]
    seen["aborts"] += sum(event.finish is FinishReason.ABORT for event in last)
    seen["stops"] += sum(event.finish is FinishReason.STOP for event in last)
    again = play(setting, asked)
    assert again.plans == engine.plans, "the order of work is not determined by the requests"


def test_tokens_do_not_depend_on_the_plans() -> None:
    seen.clear()
    check_all()
    figures = ("num_preemptions", "num_chunks", "num_prefix_hit_tokens")
    for event in (*figures, "aborts", "stops", "blocked", "in_flight", "wasted"):
        assert seen[event] > 20, seen


# -- one thing at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "0123"), ("priority", "2013")])
def test_policy_order(policy: str, order: str) -> None:
    engine = Engine(policy=policy, rows=1)
    for priority in (0, 0, -1, 7):
        engine.add([1, 2, 3], priority=priority)
    engine.run()
    assert "".join(engine.finished) == order


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "2"), ("priority", "1")])
def test_the_last_in_the_order_is_preempted(policy: str, victim: str) -> None:
    engine = Engine(policy=policy, block_size=1, num_blocks=12, max_model_len=12, caching=False)
    for priority in (0, 5, 1):
        engine.add([1, 2, 3], priority=priority, max_tokens=3)
    while not engine.stats.num_preemptions:
        engine.step()
    assert [i for i, request in engine.requests.items() if request.num_preemptions] == [victim]
    engine.run()


def test_rows_are_taken_smallest_first_and_released_once() -> None:
    engine = Engine(rows=3)
    for _ in range(3):
        engine.add([1])
    assert [admission.row for admission in engine.step().admitted] == [0, 1, 2]
    engine.abort("2")
    engine.abort("0")
    engine.add([1])
    plan = engine.step()
    assert (plan.released, [admission.row for admission in plan.admitted]) == ([2, 0], [0])
    assert engine.step().released == []


@pytest.mark.parametrize("moment", ["waiting", "preempted", "running", "planned", "executed"])
def test_abort_at_every_moment(moment: str) -> None:
    engine = Engine(block_size=1, num_blocks=12, max_model_len=12, caching=False)
    other = engine.add([1, 2, 3], max_tokens=8)
    request = engine.add([4, 5, 6], max_tokens=8)
    if moment == "preempted":
        while not request.num_preemptions:
            engine.step()
    elif moment != "waiting":
        engine.step()
    num_generated = request.num_generated
    if moment == "planned":
        engine.step(abort_planned=("1",))
    elif moment == "executed":
        engine.step(abort_executed=("1",))
    else:
        assert engine.abort("1") is not None
    event = engine.events["1"][-1]
    assert (event.token_ids, event.finish) == ([], FinishReason.ABORT)
    assert event.usage[:3] == (3, 0, num_generated)
    assert engine.cache.num_used == len(other.blocks)
    assert engine.step().released == ([] if moment in ("waiting", "preempted") else [1])
    engine.run()
    assert engine.abort("0") is None
    assert engine.abort("1") is None
    assert "1" not in engine.scheduler
    check_events(other, engine.events["0"], 12)


def test_an_abort_of_the_head_lets_the_next_in() -> None:
    engine = Engine(block_size=4, num_blocks=4, max_model_len=16)
    engine.add([1] * 9)
    engine.step()
    engine.add([2] * 12)
    engine.add([3])
    assert engine.step().admitted == []  # nobody overtakes the head
    engine.abort("1")
    assert [admission.token_ids for admission in engine.step().admitted] == [[3]]


def test_a_request_is_admitted_only_if_all_its_tokens_fit() -> None:
    engine = Engine(block_size=4, num_blocks=5, max_model_len=20, budget=2, caching=False)
    engine.add([1] * 9, max_tokens=1)
    engine.add([2] * 9, max_tokens=1)
    while engine.requests["0"].row is not None or not engine.plans:
        plan = engine.step()
        assert engine.requests["1"].row is None
        assert len(plan.slices) == 1
    engine.run()
    assert engine.stats.num_preemptions == 0


def test_preempted_before_its_first_token_and_found_again() -> None:
    """What it finds of itself when it comes back is not called cached: nobody saved that work."""
    engine = Engine(block_size=4, num_blocks=4, max_model_len=16, budget=3, chunk=2)
    engine.add([1] * 7, max_tokens=5)
    request = engine.add([2] * 8, max_tokens=2)
    while not request.num_preemptions:
        engine.step()
    assert request.num_generated == 0
    while request.row is None:
        plan = engine.step()
    assert plan.slices[-1].start == 4
    engine.run()
    assert (request.num_cached, engine.stats.num_prefix_hit_tokens) == (0, 0)
    check_events(request, engine.events["1"], 16)


@pytest.mark.parametrize("caching", [False, True])
def test_a_preemption_costs_no_more_with_a_step_in_flight(caching: bool) -> None:
    """Else a request that needs one block more would be admitted without it, again and again."""
    computed, preemptions = [], []
    for depth in (0, 1, 2):
        engine = Engine(
            num_blocks=16, block_size=16, max_model_len=256, depth=depth, caching=caching
        )
        engine.add([1] * 161, max_tokens=60)
        engine.add([2] * 80, max_tokens=10)
        engine.run()
        computed.append(engine.runner.num_computed)
        preemptions.append(engine.stats.num_preemptions)
        for request in engine.requests.values():
            check_events(request, engine.events[request.id], 256)
    assert preemptions[0] > 0
    assert len(set(preemptions)) == 1
    assert max(computed) <= min(computed) + 2 * len(engine.requests)  # a token past an end


def test_prompt_logprobs_are_delivered_though_a_preemption_came_first() -> None:
    engine = Engine(block_size=4, num_blocks=4, max_model_len=16, budget=3, chunk=2)
    engine.add([1] * 7, max_tokens=5)
    request = engine.add([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=2, prompt_logprobs=0)
    while not request.num_preemptions:
        engine.step()
    assert request.num_generated == 0
    assert len(request.prompt_logprobs or ()) > 1, "some of them were known before"
    engine.run()
    assert len(engine.events["1"][0].prompt_logprobs or ()) == 8
    check_events(request, engine.events["1"], 16)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
def test_a_block_is_offered_only_when_it_is_full(chunk: int) -> None:
    """Chunks end inside of blocks, also of the prompt's last full one, when another comes."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for num_steps in range(1, -(-9 // chunk)):
        engine = Engine(block_size=4, chunk=chunk)
        first = engine.add(prompt, max_tokens=2)
        for _ in range(num_steps - 1):
            engine.step()
        second = engine.add(prompt, max_tokens=2)
        engine.step()
        num_computed = chunk * num_steps
        assert (first.num_computed, first.num_chained) == (num_computed, num_computed // 4)
        assert second.num_cached == num_computed // 4 * 4
        engine.run()
        for request in (first, second):
            check_events(request, engine.events[request.id], 64)


def test_a_waiting_request_is_admitted_when_others_have_cached_its_prefix() -> None:
    """Two copies do not fit, but one and the blocks that only the second needs do."""
    engine = Engine(block_size=4, num_blocks=20, budget=8, chunk=6)
    prompt = [token_id % VOCAB_SIZE for token_id in range(48)]
    first, second = engine.add(prompt, max_tokens=16), engine.add(prompt, max_tokens=2)
    while second.row is None:
        engine.step()
    # 8 of 20 blocks are free beside the 12 of the first: 4 must be shared, 16 tokens, 3 chunks.
    assert len(engine.plans) == 3
    assert second.num_cached == 16
    assert first.row is not None
    engine.run()
    for request in (first, second):
        check_events(request, engine.events[request.id], 64)


def test_only_the_head_of_the_queue_is_tried_and_not_in_vain() -> None:
    engine = Engine(block_size=4, num_blocks=4, max_model_len=16)
    tried = []
    match = engine.cache.match

    def recorded(request: Request) -> None:
        tried.append(request.id)
        match(request)

    engine.add([1] * 11, max_tokens=4)  # goes on into a block of which another would be made
    for _ in range(300):
        engine.add([2] * 12)
    engine.cache.match = recorded  # type: ignore[method-assign]
    for _ in range(4):
        engine.step()
    assert (tried, engine.finished) == (["0", "1"], ["0"])
    engine.step()
    assert tried[2] == "1"


def test_identical_prompts_of_one_step_are_computed_once() -> None:
    engine = Engine(block_size=4, budget=100)
    for _ in range(8):
        engine.add([1] * 11, max_tokens=1)
    engine.step()
    assert engine.runner.num_computed == 11 + 7 * 3
    assert [r.num_cached for r in engine.requests.values()] == [0] + [8] * 7
    stats = engine.stats
    assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (88, 56)


def test_tenants_do_not_share() -> None:
    engine = Engine(block_size=4)
    for salt in ("", "a", "b", "a"):
        engine.add([1] * 9, salt=salt)
    engine.run()
    assert [r.num_cached for r in engine.requests.values()] == [0, 0, 0, 8]


def test_prompt_logprobs_compute_a_cached_prompt_once_more() -> None:
    engine = Engine(block_size=4, chunk=3)
    engine.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
    engine.run()
    request = engine.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=2, prompt_logprobs=0)
    engine.run()
    assert request.num_cached == 0
    assert engine.stats.num_prefix_query_tokens == 9
    check_events(request, engine.events["1"], 64)


def test_statistics_and_usage() -> None:
    engine = Engine(block_size=4, budget=5)
    request = engine.add([1, 2, 3, 4, 5, 6, 7], max_tokens=2)
    request.arrival_s -= 100.0
    late = engine.add([1])
    late.arrival_s -= 100.0
    engine.step()
    engine.abort(late.id)
    engine.run()
    usage = engine.events["0"][-1].usage
    assert usage == Usage(7, 0, 2, usage.queue_s)
    assert 100.0 <= usage.queue_s < 200.0
    assert 100.0 <= engine.events["1"][-1].usage.queue_s < 200.0
    assert engine.stats == EngineStats(
        num_blocks=64,
        num_steps=3,
        num_prompt_tokens=7,
        num_generated_tokens=2,
        num_prefix_query_tokens=7,
        num_chunks=1,
    )


def test_drafts_are_verified_with_the_token_before_them() -> None:
    scheduler = Engine(block_size=1).scheduler
    asked = EngineRequest(
        request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=5)
    )
    request = Request(asked, seed=0, arrival=0, arrival_s=0.0)
    scheduler.add(request)
    scheduler.commit(scheduler.schedule(), StepResult({0: [4]}, {}, {}))
    assert (request.num_computed, request.num_tokens) == (3, 4)
    request.draft = [5, 6]
    plan = scheduler.schedule()
    assert plan.slices == [Slice(0, 3, 3)]
    assert request.num_chained == 4, "a guess must not be offered to other requests"
    (event,) = scheduler.commit(plan, StepResult({0: [5, 7]}, {}, {}))  # 5 accepted, 6 refused
    assert (event.token_ids, request.draft) == ([5, 7], [])
    assert (request.num_computed, request.num_tokens) == (5, 6)
    scheduler.check()
    request.draft = [8, 9]
    (event,) = scheduler.commit(scheduler.schedule(), StepResult({0: [8, 9, 1]}, {}, {}))
    assert (event.token_ids, event.finish) == ([8, 9], FinishReason.LENGTH)


def test_a_preemption_drops_the_draft() -> None:
    """The pool is asked for the tokens of a waiting request only, not for its guesses."""
    engine = Engine()
    request = engine.add([1, 2, 3])
    engine.step()
    request.draft = [5, 6]
    engine.scheduler._preempt_last()
    engine.scheduler.check()
    assert request.num_pending == request.num_tokens


def test_a_pool_that_cannot_hold_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`63` tokens, less than .* `64`"):
        Engine(block_size=1, num_blocks=63, max_model_len=64)


@pytest.mark.parametrize("spoil", ["computed", "row", "order", "flight", "forgotten"])
def test_check_finds_what_is_spoilt(spoil: str) -> None:
    engine = Engine()
    first, second = engine.add([1, 2]), engine.add([1, 2])
    engine.step()
    if spoil == "computed":
        first.num_computed = first.num_tokens
    elif spoil == "row":
        first.row = second.row
    elif spoil == "flight":
        first.num_in_flight = 1  # without a plan that is out
    elif spoil == "order":
        first.arrival = second.arrival
    else:
        del engine.scheduler._requests[first.id]
    with pytest.raises(AssertionError):
        engine.scheduler.check()

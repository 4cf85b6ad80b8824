"""A scheduler with a runner that has no model, and the naive loop that tells what must come out.

The fake runner knows of a request only what the plans say. Its KV store keeps, instead of keys and
values, the whole prefix that they stand for, so a block that holds anything else than it should
(a false hit, a block taken too early, a position computed twice or never) is found at once.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any

from penstock.engine.kv_cache import KVCache
from penstock.engine.plan import Admission, Slice, StepPlan, StepResult
from penstock.engine.policy import POLICIES
from penstock.engine.request import Request
from penstock.engine.runner import Done
from penstock.engine.scheduler import Scheduler
from penstock.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)

EOS = 0
VOCAB_SIZE = 16


def next_token(prefix: tuple[int, ...], seed: int) -> int:
    """The fake model: any function of the whole prefix."""
    return hash((prefix, seed)) % VOCAB_SIZE


def logprob(prefix: tuple[int, ...]) -> TokenLogprobs:
    return TokenLogprobs(prefix[-1], -float(hash(prefix) % 1000), 1)


class FakeRunner:
    """Executes plans: applies them to its rows, writes all KV of the step, then reads all KV.

    It does so when a step is launched, like a device that is infinitely fast; at a depth of 1 and
    more the scheduler learns of it later.
    """

    description = "fake"

    def __init__(self, num_blocks: int, block_size: int, depth: int = 0) -> None:
        self.depth = depth
        self.block_size = block_size
        self.kv: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.admissions: dict[int, Admission] = {}
        self.num_computed = 0
        self.was_cut = False  # a plan was not carried out: the next one may release free rows

    def launch(self, plan: StepPlan) -> Done:
        return Done(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        for row in plan.released:
            assert row in self.tokens or self.was_cut
            for rows in (self.tokens, self.tables, self.admissions):
                rows.pop(row, None)
        self.was_cut = False
        for admission in plan.admitted:
            assert admission.row not in self.tokens
            self.tokens[admission.row] = list(admission.token_ids)
            self.tables[admission.row] = []
            self.admissions[admission.row] = admission
        for row, blocks in plan.new_blocks:
            self.tables[row] += blocks
        assert len({row for row, _, _ in plan.slices}) == len(plan.slices)
        for row, start, length in plan.slices:
            assert length > 0
            self.num_computed += length
            for position in range(start, start + length):
                self.kv[self.slot(row, position)] = tuple(self.tokens[row][: position + 1])
        result = StepResult({}, {}, {})
        for slice_ in plan.slices:
            self.attend_and_sample(slice_, result)
        return result

    def attend_and_sample(self, slice_: Slice, result: StepResult) -> None:
        row, start, length = slice_
        end, tokens, admission = start + length, self.tokens[row], self.admissions[row]
        for position in range(end):
            assert self.kv[self.slot(row, position)] == tuple(tokens[: position + 1])
        if admission.params.prompt_logprobs is not None:
            stop = min(end + 1, admission.num_prompt)
            result.prompt_logprobs[row] = [
                logprob(tuple(tokens[: position + 1])) for position in range(start + 1, stop)
            ]
        if end == len(tokens):
            token_id = next_token(tuple(tokens), admission.seed)
            tokens.append(token_id)
            result.token_ids[row] = [token_id]
            if admission.params.logprobs is not None:
                result.logprobs[row] = [logprob(tuple(tokens))]

    def slot(self, row: int, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return self.tables[row][block] * self.block_size + offset


class Engine:
    """A scheduler, its cache and the fake runner; checks the invariants after every call."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        caching: bool = True,
        policy: str = "fcfs",
        rows: int = 8,
        budget: int = 64,
        chunk: int = 0,
        max_model_len: int = 64,
        depth: int = 0,
    ) -> None:
        self.cache = KVCache(num_blocks, block_size, caching)
        self.scheduler = Scheduler(
            self.cache,
            POLICIES[policy](),
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_token_ids=[EOS],
            long_prefill_token_threshold=chunk,
        )
        self.runner = FakeRunner(num_blocks, block_size, depth)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.plans: list[StepPlan] = []
        self.finished: list[str] = []
        self.num_blocked = 0  # steps in which the head of the queue lacked blocks
        self.budget, self.chunk = budget, chunk or budget

    def add(self, prompt: list[int], priority: int = 0, salt: str = "", **params: Any) -> Request:
        number = len(self.requests)
        asked = EngineRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            params=SamplingParams(**{"ignore_eos": True, "max_tokens": 4} | params),
            priority=priority,
            salt=salt,
        )
        request = Request(asked, seed=number, arrival=number, arrival_s=time.monotonic())
        self.requests[request.id] = request
        self.events[request.id] = []
        self.scheduler.add(request)
        self.scheduler.check()
        return request

    def abort(self, request_id: str) -> TokenEvent | None:
        event = self.scheduler.abort(request_id)
        self.scheduler.check()
        if event is not None:
            self.events[request_id].append(event)
        return event

    def step(
        self,
        abort_planned: tuple[str, ...] = (),
        abort_executed: tuple[str, ...] = (),
    ) -> StepPlan:
        """One step; aborts what is named after it was planned, or after it was executed."""
        assert len(self.plans) < 10_000, "the requests do not come to an end"
        plan = self.scheduler.schedule()
        self.scheduler.check()
        self.check_queue(plan)
        assert sum(slice_.length for slice_ in plan.slices) <= self.budget
        assert all(slice_.length <= self.chunk for slice_ in plan.slices)
        for request_id in abort_planned:
            self.abort(request_id)
        if plan.slices:
            self.in_flight.append((plan, self.runner.execute(plan)))
            self.plans.append(plan)
        for request_id in abort_executed:
            self.abort(request_id)
        while len(self.in_flight) > (self.runner.depth if plan.slices else 0):
            for event in self.scheduler.commit(*self.in_flight.popleft()):
                self.events[event.request_id].append(event)
                if event.finish is not None:
                    self.finished.append(event.request_id)
            self.scheduler.check()
        return plan

    def check_queue(self, plan: StepPlan) -> None:
        """Assert that the head of the queue does not wait in vain, from the trie itself."""
        scheduler, cache, size = self.scheduler, self.cache, self.cache.block_size
        num_left = self.budget - sum(slice_.length for slice_ in plan.slices)
        if not scheduler._waiting or not scheduler._free_rows or num_left == 0:
            return
        head = scheduler._waiting[0]
        if head.num_in_flight:
            return  # it is not known yet how much it needs
        num_needed, num_free = -(-head.num_tokens // size), cache.num_free
        node: int | str = head.salt
        for start in range(0, (head.num_tokens - 1) // size * size, size):
            found = cache._nodes.get((node, tuple(head.token_ids[start : start + size])))
            if found is None or head.prompt_logprobs is not None:
                break
            node, block = found
            num_needed -= 1
            num_free -= block in cache._free
        assert num_needed > num_free, head.id
        self.num_blocked += 1

    def run(self) -> None:
        while self.scheduler.has_work:
            was_in_flight = bool(self.in_flight)
            assert self.step().slices or was_in_flight, "no work, though there is a live request"
        while self.in_flight:
            self.step()

    @property
    def stats(self) -> EngineStats:
        return replace(self.scheduler.stats)


def expected_events(request: Request, max_model_len: int) -> tuple[list[int], FinishReason]:
    """The naive loop."""
    params, tokens = request.params, list(request.token_ids[: request.num_prompt])
    while True:
        tokens.append(next_token(tuple(tokens), request.seed))
        generated = tokens[request.num_prompt :]
        if tokens[-1] == EOS and not params.ignore_eos and len(generated) > params.min_tokens:
            return generated, FinishReason.STOP
        if len(generated) == params.max_tokens or len(tokens) == max_model_len:
            return generated, FinishReason.LENGTH


def check_events(request: Request, events: list[TokenEvent], max_model_len: int) -> None:
    """What a client gets is what the naive loop gives, or the beginning of it if it was aborted."""
    token_ids = [token_id for event in events for token_id in event.token_ids]
    expected, reason = expected_events(request, max_model_len)
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    last = events[-1]
    if last.finish is FinishReason.ABORT:
        assert token_ids == expected[: len(token_ids)]
    else:
        assert (token_ids, last.finish) == (expected, reason)
    assert last.stop_token_id == (EOS if last.finish is FinishReason.STOP else None)
    assert last.usage[:3] == (request.num_prompt, request.num_cached, len(token_ids))
    assert last.usage.queue_s >= 0

    tokens = request.token_ids
    if request.params.logprobs is not None:
        given = [item for event in events for item in event.logprobs or ()]
        start = request.num_prompt + 1
        assert given == [logprob(tuple(tokens[:end])) for end in range(start, start + len(given))]
        assert len(given) == len(token_ids)
    reports = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    if request.params.prompt_logprobs is None or not token_ids:
        assert reports == []
    else:
        prompt = range(2, request.num_prompt + 1)
        assert reports == [[None, *(logprob(tuple(tokens[:end])) for end in prompt)]]
        assert events[0].prompt_logprobs is not None

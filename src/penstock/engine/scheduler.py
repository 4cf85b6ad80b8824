"""Which tokens are computed in the next step: running requests first, then waiting ones.

Owns the live requests, their rows and their order; knows neither tensors nor text. There are no
phases: each request gets min(pending tokens, what is left of the budget, chunk cap), in the order
of the policy. Feature logic lives elsewhere; a line added here needs a reason.

Invariant: a slice that is planned is executed, in the order of the plans, or all starts anew; so
several plans may be out before the first is committed. Requests lose their blocks only from the end
of the order, slices are handed out from its beginning, and what is admitted fits without a
preemption.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection
from itertools import pairwise
from typing import final

from penstock.engine.kv_cache import KVCache
from penstock.engine.plan import Admission, Slice, StepPlan, StepResult
from penstock.engine.policy import AdmissionPolicy
from penstock.engine.request import Request
from penstock.errors import ConfigError
from penstock.types import EngineStats, FinishReason, TokenEvent


@final
class Scheduler:
    """The order of work of one engine. Every plan of `schedule` comes to `commit`, or `restart`.

    `add` and `abort` may be called at any moment, also between the two.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        policy: AdmissionPolicy,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        long_prefill_token_threshold: int = 0,
    ) -> None:
        """Make a scheduler without requests.

        Args:
            kv_cache: the pool; nobody else takes blocks from it.
            policy: the order of requests.
            max_num_seqs: rows, the most requests that run at once.
            max_num_batched_tokens: the most tokens of one step.
            max_model_len: the most tokens of one request.
            eos_token_ids: tokens that end a request that does not ignore them.
            long_prefill_token_threshold: the most tokens of one request in one step; 0: no cap.

        Raises:
            ConfigError: the pool cannot hold one request of `max_model_len` tokens, which could
                then never be finished.
        """
        capacity = kv_cache.num_blocks * kv_cache.block_size
        if capacity < max_model_len:
            raise ConfigError(
                f"The KV cache holds `{capacity}` tokens, less than one request of "
                f"`max_model_len` = `{max_model_len}`.",
                hint="lower `max_model_len`, or give the KV cache more memory",
            )
        assert max_num_seqs > 0
        assert max_num_batched_tokens > 0
        self._kv = kv_cache
        self._key = policy.key
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_chunk = long_prefill_token_threshold or max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)

        self._requests: dict[str, Request] = {}  # all live ones
        self._running: list[Request] = []  # sorted by key, as is
        self._waiting: list[Request] = []
        self._max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs))  # a heap: the smallest row is taken first
        self._released: list[int] = []  # rows given up since the last plan
        self._planned: deque[list[Request]] = deque()  # by plan that is out, who has its slices

        self.stats = EngineStats(num_blocks=kv_cache.num_blocks)  # all but `last_step_s`

    @property
    def has_work(self) -> bool:
        """Whether a request is live. A plan has slices then, or another one is out."""
        return bool(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """Let a new request wait; its id must be that of no live one."""
        assert request.id not in self._requests, request.id
        assert 0 < request.num_tokens < self._max_model_len, request.num_tokens
        insort(self._waiting, request, key=self._key)
        self._requests[request.id] = request
        self._gauge()

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request now; what a step in flight computes for it is dropped.

        Returns:
            Its last event; None if there is no such live request.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.row is None and request.num_preemptions == 0:
            request.queue_s = time.monotonic() - request.arrival_s
        self._forget(request)
        self._gauge()
        return TokenEvent(request_id, [], request.usage, FinishReason.ABORT)

    def schedule(self) -> StepPlan:
        """Plan one step. The plan must be executed and be given to `commit`; else call `restart`.

        A plan without slices is not to be executed: all that is left to know is in flight.
        A slice may read blocks that another slice of the same plan fills (see `KVCache.commit`).
        """
        plan = StepPlan([], [], self._released, [])
        self._planned.append([])
        budget = self._max_num_batched_tokens
        for request in self._running:  # a preemption shortens the list, from its end
            budget -= self._plan_slice(request, plan, budget)
            if budget == 0:
                break
        while budget > 0 and (admitted := self._admit_next(plan)) is not None:
            budget -= self._plan_slice(admitted, plan, budget)
        if plan.slices:
            self._released = []
            self._gauge()
        else:
            assert not plan.admitted
            self._planned.pop()
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Take in what the oldest plan gave: one event for each request that got tokens."""
        events = []
        planned = self._planned.popleft()
        for (row, start, length), request in zip(plan.slices, planned, strict=True):
            if self._requests.get(request.id) is not request:
                continue  # it has ended since the plan was made
            end = start + length
            if start < request.num_prompt:
                self.stats.num_prompt_tokens += min(end, request.num_prompt) - start
                request.collect_prompt_logprobs(start, result.prompt_logprobs.get(row, ()))
            if end < len(request.token_ids):
                self.stats.num_chunks += 1
            else:
                events.append(self._extend(request, row, result))
        self.stats.num_steps += 1
        self._gauge()
        return events

    def restart(self) -> None:
        """Let every live request start anew, after a step that came to no end anywhere in it.

        It is not known what the runner has done, nor how far `schedule` or `commit` came: nothing
        but the requests' tokens is relied upon. All rows are released and nothing stays cached.
        """
        self._kv.clear()
        for request in self._requests.values():
            if request.row is not None:
                request.row = None
                request.num_preemptions += 1
                self.stats.num_preemptions += 1
            request.blocks, request.num_computed, request.num_in_flight = [], 0, 0
            request.node, request.num_chained = request.salt, 0
            request.draft.clear()
        self._planned.clear()
        self._running = []
        self._waiting = sorted(self._requests.values(), key=self._key)
        self._free_rows = list(range(self._max_num_seqs))
        self._released = list(range(self._max_num_seqs))
        self._gauge()

    def check(self) -> None:
        """Assert the invariants of `request.py` and of the cache. Call it between any two calls."""
        live = [*self._running, *self._waiting]
        assert {request.id: request for request in live} == self._requests
        for queue in (self._running, self._waiting):
            keys = [self._key(request) for request in queue]
            assert all(a < b for a, b in pairwise(keys)), keys
        for request in live:
            num_tokens = request.num_tokens + request.num_in_flight
            assert num_tokens <= self._max_model_len, request.id
            assert 0 <= request.num_computed < num_tokens + len(request.draft), request.id
            assert request.num_tokens < self._max_model_len, request.id
            assert 0 <= request.num_in_flight <= len(self._planned), request.id
        for request in self._running:
            assert request.num_computed <= len(request.blocks) * self._kv.block_size
        for request in self._waiting:
            assert request.row is None
            assert not request.blocks
            assert request.num_computed == 0
        rows = [*self._free_rows, *(request.row for request in self._running)]
        assert sorted(row for row in rows if row is not None) == list(range(self._max_num_seqs))
        self._kv.check(live)

    def _gauge(self) -> None:
        """Bring the figures up to date that are no counters."""
        self.stats.num_running = len(self._running)
        self.stats.num_waiting = len(self._waiting)
        self.stats.num_used_blocks = self._kv.num_used

    def _plan_slice(self, request: Request, plan: StepPlan, budget: int) -> int:
        """Plan the next tokens of a running request.

        Returns:
            How many; 0 if there are no blocks for them and the request had to preempt itself, or if
            its last token is in flight.
        """
        num_known, num_in_flight = len(request.token_ids), request.num_in_flight
        if num_in_flight and request.will_end(self._max_model_len):
            return 0
        start = request.num_computed
        length = request.num_pending
        if length > 1:
            length = min(length, self._max_chunk, budget)
        end = start + length
        block_size = self._kv.block_size
        if end > len(request.blocks) * block_size and not self._grow(request, plan, end):
            return 0
        if end >= num_known + num_in_flight:
            request.num_in_flight = num_in_flight + 1
        else:
            num_known = min(end, num_known)
        if num_known // block_size > request.num_chained:
            self._kv.commit(request, num_known)
        assert request.row is not None
        plan.slices.append(Slice(request.row, start, length))
        self._planned[-1].append(request)
        request.num_computed = end
        return length

    def _grow(self, request: Request, plan: StepPlan, num_tokens: int) -> bool:
        """Find blocks for a running request, at the cost of the last in the order if need be."""
        while (blocks := self._kv.grow(request, num_tokens)) is None:
            if self._preempt_last() is request:
                return False
        assert request.row is not None
        plan.new_blocks.append((request.row, blocks))
        return True

    def _vacate(self, request: Request) -> None:
        """Give back row and blocks of a request that ran."""
        assert request.row is not None
        self._kv.release(request)
        self._released.append(request.row)
        heapq.heappush(self._free_rows, request.row)
        request.row = None

    def _preempt_last(self) -> Request:
        """Let the last of the running requests wait again; its tokens will be computed anew.

        What is in flight of it still counts: else it would be admitted with a token less than it
        was preempted for, again and again.
        """
        request = self._running.pop()
        self._vacate(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.draft.clear()
        insort(self._waiting, request, key=self._key)
        self.stats.num_preemptions += 1
        return request

    def _admit_next(self, plan: StepPlan) -> Request | None:
        """Give the head of the queue a row, if one is free and all its tokens fit into the pool.

        To reserve blocks for all tokens, though maybe only a chunk is computed now, keeps requests
        that were admitted together from preempting one another. Nobody overtakes the head.
        """
        if not self._waiting or not self._free_rows:
            return None
        request = self._waiting[0]
        if request.num_in_flight or self._kv.num_gains < request.num_gains_awaited:
            return None
        matches = request.prompt_logprobs is None  # else each position must be computed
        if matches:
            self._kv.match(request)
        num_cached = len(request.blocks) * self._kv.block_size
        if self._kv.grow(request, request.num_tokens) is None:
            num_missing = -(-request.num_tokens // self._kv.block_size) - len(request.blocks)
            num_missing -= self._kv.num_free
            self._kv.release(request)
            request.num_gains_awaited = self._kv.num_gains + num_missing
            return None
        if request.num_preemptions == 0:  # what it finds of its own work later is no saving
            request.num_cached = num_cached
            request.queue_s = time.monotonic() - request.arrival_s
            self.stats.num_prefix_hit_tokens += num_cached
            if matches and self._kv.enable_prefix_caching:
                self.stats.num_prefix_query_tokens += request.num_prompt
        request.num_computed = num_cached
        row = request.row = heapq.heappop(self._free_rows)
        insort(self._running, self._waiting.pop(0), key=self._key)
        plan.admitted.append(
            Admission(
                row, request.token_ids.copy(), request.num_prompt, request.params, request.seed
            )
        )
        plan.new_blocks.append((row, request.blocks.copy()))
        return request

    def _extend(self, request: Request, row: int, result: StepResult) -> TokenEvent:
        """Append what was sampled for a request, and end it if that does."""
        is_first = len(request.token_ids) == request.num_prompt
        finish, num_kept = None, 0
        request.num_in_flight -= 1
        token_ids = result.token_ids[row]
        for token_id in token_ids:
            num_kept += 1
            finish = request.finish_with(token_id, self._eos_token_ids, self._max_model_len)
            if finish is not None:
                token_ids = token_ids[:num_kept]
                if request.row is not None:
                    self._kv.commit(request, len(request.token_ids))  # known later than planned
                self._forget(request)  # before it is complete: `restart` must not find it
                request.token_ids.append(token_id)
                break
            request.token_ids.append(token_id)
        if request.row is not None and request.num_in_flight == 0:
            request.num_computed = len(request.token_ids) - 1
        request.draft.clear()
        self.stats.num_generated_tokens += num_kept
        logprobs = result.logprobs.get(row)
        return TokenEvent(
            request.id,
            token_ids,
            request.usage,
            finish,
            token_ids[-1] if finish is FinishReason.STOP else None,
            None if logprobs is None else logprobs[:num_kept],
            request.prompt_logprobs if is_first else None,
        )

    def _forget(self, request: Request) -> None:
        """Take a live request out of the books."""
        queue = self._waiting if request.row is None else self._running
        index = bisect_left(queue, self._key(request), key=self._key)
        assert queue[index] is request
        del self._requests[request.id], queue[index]
        if request.row is not None:
            self._vacate(request)

"""A request, as the engine sees it: two integers, how many tokens it has and how many are computed.

Prefill, decode, chunks, prefix hits, preemption and speculation are values of these two. A step
counts as computed from when it is planned; until it is read, the token that it samples is *in
flight*: it counts, and nobody here knows it. A request *waits* or *runs*; the scheduler forgets it
when it finishes. At all times, of every live request:

1. `0 <= num_computed < num_tokens + num_in_flight`: the token sampled last is never computed yet.
2. waiting: no row, no block, nothing computed; in flight may be what was planned before it was
   preempted. Running: one row of its own, and blocks that cover the computed tokens. Finished: no
   row, no block.
3. `blocks` only grows while the request runs, and block `i` holds tokens [i * B, (i + 1) * B).

Checked by `Scheduler.check()`; what holds of blocks is stated and checked in `KVCache.check()`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from penstock.types import EngineRequest, FinishReason, TokenLogprobs, Usage


class Request:
    """One live request. Only the scheduler and the KV cache write to it."""

    __slots__ = (
        "arrival",
        "arrival_s",
        "blocks",
        "draft",
        "id",
        "node",
        "num_cached",
        "num_chained",
        "num_computed",
        "num_gains_awaited",
        "num_in_flight",
        "num_preemptions",
        "num_prompt",
        "params",
        "priority",
        "prompt_logprobs",
        "queue_s",
        "row",
        "salt",
        "seed",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, request: EngineRequest, *, seed: int, arrival: int, arrival_s: float
    ) -> None:
        """Make a request that waits.

        Args:
            request: what was asked, already validated: a prompt that is not empty and is shorter
                than the context.
            seed: of its random numbers.
            arrival: a sequence number, unique; it orders requests.
            arrival_s: `time.monotonic()` when it arrived.
        """
        self.id = request.request_id
        self.params = request.params
        self.priority = request.priority
        self.salt = request.salt
        self.seed = seed
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.arrival = arrival
        self.arrival_s = arrival_s

        self.token_ids = list(request.prompt_token_ids)  # prompt, then what was generated
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0  # tokens whose KV lies in `blocks`, or will when all planned is done
        self.num_in_flight = 0  # tokens that planned steps sample, and that were not read yet
        self.draft: list[int] = []  # guesses of what follows `token_ids`, to be verified

        self.row: int | None = None  # in the device state, while it runs
        self.blocks: list[int] = []
        # Its place in the prefix cache: the node of its first `num_chained` blocks.
        self.node: int | str = self.salt
        self.num_chained = 0
        self.num_gains_awaited = 0  # waiting: without a chance before that many `KVCache.num_gains`

        self.num_cached = 0  # tokens found in the prefix cache at the first admission
        self.num_preemptions = 0
        self.queue_s = 0.0  # from arrival to the first admission
        # By position, as far as known; a preemption does not unlearn them. None: not asked for.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if self.params.prompt_logprobs is None else [None]
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are certain: the prompt and what was generated."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens to compute before one can be sampled, and the guesses to verify with them."""
        return len(self.token_ids) + self.num_in_flight + len(self.draft) - self.num_computed

    @property
    def usage(self) -> Usage:
        """What the request has used so far."""
        num_generated = len(self.token_ids) - self.num_prompt
        return Usage(self.num_prompt, self.num_cached, num_generated, self.queue_s)

    def will_end(self, max_model_len: int) -> bool:
        """Whether the tokens in flight are the last ones, whatever they are."""
        num_tokens = len(self.token_ids) + self.num_in_flight
        max_tokens = self.params.max_tokens
        return num_tokens >= max_model_len or (
            max_tokens is not None and num_tokens - self.num_prompt >= max_tokens
        )

    def finish_with(
        self, token_id: int, eos_token_ids: Collection[int], max_model_len: int
    ) -> FinishReason | None:
        """Whether the request ends with `token_id`, if that is its next token.

        An end or stop token counts only behind the first `min_tokens` tokens (where the sampler
        does not give it either); it ends the request even where the length would, too.
        """
        params = self.params
        num_tokens = len(self.token_ids) + 1
        num_generated = num_tokens - self.num_prompt
        if (
            (token_id in eos_token_ids and not params.ignore_eos) or token_id in self.stop_token_ids
        ) and num_generated > params.min_tokens:
            return FinishReason.STOP
        if num_generated == params.max_tokens or num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    def collect_prompt_logprobs(self, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Keep the log-probabilities of the prompt positions start + 1, start + 2, ...

        Positions known from before a preemption are computed again, but not kept twice.
        """
        known = self.prompt_logprobs
        if known is not None:
            known.extend(logprobs[len(known) - (start + 1) :])

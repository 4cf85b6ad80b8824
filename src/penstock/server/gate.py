"""The gate in front of the engine: how many requests may be open, and whether any may come.

Owns admission (429), draining and the judgement of readiness (503). Knows no HTTP. Invariant: what
`admit` and `charge` have counted for a call is taken back by `release`, once.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

from penstock.engine.client import EngineClient
from penstock.errors import InvalidField
from penstock.server.calls import Call
from penstock.server.failures import Draining, QueueFull, ShuttingDown
from penstock.server.settings import ServerSettings

_MAX_RETRY_AFTER_S = 60


@dataclass(slots=True)
class _Share:
    num_requests: int
    num_tokens: int = 0


class Gate:
    """Counts the open requests of one engine. Used in one event loop only."""

    def __init__(self, client: EngineClient, settings: ServerSettings) -> None:
        self._client = client
        self._settings = settings
        self._open: dict[Call, _Share] = {}
        self._num_requests = 0
        self._num_tokens = 0
        self._mean_s = 1.0  # of a request, smoothed: what Retry-After is estimated from
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def num_open(self) -> int:
        """Engine requests that are open: running, waiting, or being prepared."""
        return self._num_requests

    def admit(self, call: Call, num_requests: int) -> None:
        """Let a call in, with so many answers to make.

        Raises:
            Draining, EngineDead: nothing is let in any more.
            QueueFull: later perhaps.
            InvalidField: never; it asks for more than the queue holds.
        """
        if self.draining:
            raise Draining("The server is shutting down.", retry_after_s=5)
        if self._client.dead is not None:
            raise self._client.dead
        capacity = self._client.info.max_num_seqs + self._settings.max_queue
        if num_requests > capacity:
            raise InvalidField(
                f"The request asks for `{num_requests}` answers; the server holds `{capacity}`.",
                field="n",
                hint="send fewer prompts at once, or raise `--max-queue`",
            )
        if self._num_requests + num_requests > capacity:
            raise QueueFull(
                f"`{self._num_requests}` requests are open; at most `{capacity}` may be.",
                retry_after_s=self._retry_after_s(),
            )
        self._open[call] = _Share(num_requests)
        self._num_requests += num_requests
        self._idle.clear()

    def charge(self, call: Call, num_tokens: int) -> None:
        """Count the prompt tokens of a call that was let in.

        Raises:
            QueueFull: the open prompts are too long together. One alone always passes.
        """
        limit = self._settings.max_queue_tokens
        if self._num_tokens and self._num_tokens + num_tokens > limit:
            raise QueueFull(
                f"The open requests hold `{self._num_tokens}` prompt tokens; "
                f"at most `{limit}` may be.",
                retry_after_s=self._retry_after_s(),
            )
        self._open[call].num_tokens += num_tokens
        self._num_tokens += num_tokens

    def release(self, call: Call) -> None:
        """The call is over; also right for one that was never let in."""
        share = self._open.pop(call, None)
        if share is None:
            return
        self._num_requests -= share.num_requests
        self._num_tokens -= share.num_tokens
        self._mean_s += 0.1 * (time.monotonic() - call.started_s - self._mean_s)
        if not self._open:
            self._idle.set()

    def _retry_after_s(self) -> int:
        """When a place should be free: the queue's length in rounds of the engine."""
        rounds = self._num_requests / max(1, self._client.info.max_num_seqs)
        return min(_MAX_RETRY_AFTER_S, max(1, math.ceil(self._mean_s * rounds / 2)))

    def unready_reason(self) -> str | None:
        """Why no request should be sent here now; None: send."""
        if self.draining:
            return "draining"
        if self._client.dead is not None:
            return "engine_dead"
        stalled_s = time.monotonic() - self._due_since_s()
        return "engine_stalled" if stalled_s > self._settings.stall_timeout_s else None

    def _due_since_s(self) -> float:
        """When the engine got the work that it has not done; now if it has none.

        The engine tells of a request only with a step, so one that hangs in its first step is seen
        by what it owes, also to those who have left meanwhile.
        """
        stats = self._client.stats
        if stats.num_running + stats.num_waiting:
            return stats.last_step_s
        return max(stats.last_step_s, self._client.owed_since_s)

    def begin_drain(self) -> None:
        """Let nothing in any more; what is open goes on."""
        self.draining = True

    async def drain(self, timeout_s: float, grace_s: float = 2.0) -> int:
        """Wait for the open calls, then end those that are left. Returns how many were ended.

        Args:
            grace_s: for the ended ones to write their last event.
        """
        self.begin_drain()
        if await self._wait_idle(timeout_s):
            return 0
        left = list(self._open)
        error = ShuttingDown(f"The server shuts down; it waited `{timeout_s:g}` seconds.")
        for call in left:
            call.interrupt(error)
        await self._wait_idle(grace_s)
        return len(left)

    async def _wait_idle(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

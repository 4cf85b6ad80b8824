"""Both arms of a comparison, up when they are needed: together, or one at a time.

Only one of them is ever loaded. Knows how they are started, not what they are asked.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.measure.engines.arms import URL, ArmSpec
from penstock.measure.engines.launcher import Running, launched
from penstock.measure.meters import memory

HEADROOM = 1.3  # times the memory of the first arm must be free for the second one


class Arms:
    """The base (role 0) and the variant (role 1)."""

    def __init__(
        self,
        specs: tuple[ArmSpec, ArmSpec],
        *,
        log_dir: Path,
        residency: str,
        api_keys: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.specs = specs
        self.residency = residency  # after the start `both` or `alternate`
        self._log_dir, self._api_keys = log_dir, api_keys
        self._up: dict[int, tuple[Running, AsyncExitStack]] = {}

    async def start(self) -> tuple[Running, Running]:
        """Start both, to see that they answer; where only one can be up, the variant stays.

        Raises:
            ConfigError, EngineFailed: as `launched`.
        """
        first = await self._begin(0)
        if self.residency == "auto":
            self.residency = "both" if self._has_place(first) else "alternate"
        if self.residency == "alternate":
            await self._end(0)
        return first, await self._begin(1)

    async def get(self, role: int) -> Running:
        """The arm, up; the other one has ended if both cannot be."""
        if role in self._up:
            return self._up[role][0]
        await self._end(1 - role)
        return await self._begin(role)

    def up(self) -> dict[str, int | None]:
        """Names and processes of what is up."""
        return {running.spec.name: running.pid for running, _ in self._up.values()}

    async def close(self) -> None:
        """End both."""
        try:
            await self._end(0)
        finally:  # an arm that cannot be ended does not keep the other one
            await self._end(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _has_place(self, first: Running) -> bool:
        if self.specs[1].kind == URL or first.pid is None:
            return True
        machine, used = memory.machine_usage(), memory.tree_usage(first.pid)
        if machine is None or used is None:
            return False
        return machine.total_bytes - machine.used_bytes > HEADROOM * used.rss_bytes

    async def _begin(self, role: int) -> Running:
        spec = self.specs[role]
        more: dict[str, Any] = {"api_key": self._api_keys[role]} if spec.kind == URL else {}
        stack = AsyncExitStack()
        running = await stack.enter_async_context(launched(spec, log_dir=self._log_dir, **more))
        self._up[role] = (running, stack)
        return running

    async def _end(self, role: int) -> None:
        if role in self._up:
            _, stack = self._up.pop(role)
            await stack.aclose()

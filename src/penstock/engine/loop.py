"""The loop that drives an engine, and the messages between it and a client.

Owns the order of things: commands first, then one step, then one update for the whole batch.
Both clients run this loop, one on a thread, one in a process of its own; it knows neither.
Imports no torch, so that the process in front of the engine can share the messages.
Invariant: an abort that was sent before a step began has freed the request before that step.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from typing import Protocol, final

import msgspec

from penstock.errors import RequestError
from penstock.protocol.reports import ErrorReport
from penstock.types import EngineInfo, EngineRequest, EngineStats, TokenEvent


class Core(Protocol):
    """The synchronous engine; `engine.core.EngineCore` is one."""

    info: EngineInfo
    stats: EngineStats

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, request: EngineRequest) -> None:
        """Take a request. Raises RequestError, and has changed nothing then."""

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request and free what it holds: its last event, or none if it is not live."""

    def step(self) -> list[TokenEvent]:
        """Compute one batch."""

    def check(self) -> None:
        """Raise what has stopped the engine while it had nothing to do, if anything."""


# --- messages ---


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Run this request."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End this request; it is answered by an event with `finish`, unless it has had one."""

    request_id: str


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Leave the loop, whatever is open."""


Command = Submit | Abort | Stop


class Refuse(msgspec.Struct, frozen=True):
    """Answer that this request cannot be read: put into the loop by who reads, never sent."""

    request_id: str
    report: ErrorReport


class Update(msgspec.Struct, tag=True, frozen=True):
    """What one turn of the loop gave. Refused requests by id; they have no event."""

    events: list[TokenEvent]
    refused: dict[str, ErrorReport]
    stats: EngineStats


# --- the loop ---

_CHECK_S = 1.0  # how often an idle engine looks whether it could still serve


@final
class EngineLoop:
    """Steps an engine while there is work, sleeps while there is none.

    `send` may be called from any thread; the engine belongs to the thread in `run`.
    """

    def __init__(self, deliver: Callable[[Update], None]) -> None:
        """Commands may be sent from now on; they wait for `run`.

        Args:
            deliver: called by the thread in `run`, once a turn.
        """
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Command | Refuse] = queue.SimpleQueue()

    def send(self, command: Command | Refuse) -> None:
        """Have `command` done before the next step."""
        self._commands.put(command)

    def run(self, core: Core) -> None:
        """Serve until `Stop`. What a step raises ends the loop and is the caller's to report."""
        while True:
            events: list[TokenEvent] = []
            refused: dict[str, ErrorReport] = {}
            while (command := self._next(wait=not core.has_work)) is None and not core.has_work:
                core.check()
            while command is not None:
                if isinstance(command, Stop):
                    return
                if isinstance(command, Abort):
                    events += core.abort(command.request_id)
                elif isinstance(command, Refuse):
                    refused[command.request_id] = command.report
                else:
                    try:
                        core.add(command.request)
                    except RequestError as error:
                        refused[command.request.request_id] = ErrorReport.of(error)
                command = self._next(wait=False)
            if core.has_work:
                events += core.step()
            self._deliver(Update(events, refused, copy.copy(core.stats)))

    def _next(self, *, wait: bool) -> Command | Refuse | None:
        try:
            return self._commands.get(block=wait, timeout=_CHECK_S)
        except queue.Empty:
            return None

"""Who goes first: an admission policy is one comparison key.

The smallest key is computed and admitted first, the largest among the running is preempted first.
A key must not change while its request lives, and no two requests may have equal keys: so the
order of a step, and which row a request gets, follow from the requests alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from penstock.engine.request import Request


class AdmissionPolicy(Protocol):
    """The order of requests."""

    def key(self, request: Request) -> tuple[int, ...]:
        """The place of a request in the order; ends with `arrival`, which is unique."""


class FCFS:
    """First come, first served: nobody starves."""

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.arrival,)


class Priority:
    """A lower `priority` goes first; among equals, who came first. The others may starve."""

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.priority, request.arrival)


POLICIES: Mapping[str, type[AdmissionPolicy]] = {"fcfs": FCFS, "priority": Priority}

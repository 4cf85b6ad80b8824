"""The tables of a tracker, and the few questions that are asked of them.

A slot is a row whether it was probed or not; a request is a row whether it was answered or not, and
holds its whole record: everything that is shown is computed from records. Times are seconds since
1970, UTC. Invariant: a series has at most one slot at any moment, however many trackers write, and
only a slot that was missed by one tracker may still be probed by another.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from penstock.measure.records import Request
from penstock.measure.track.config import MAX_NAME_CHARS
from penstock.measure.track.states import INTERRUPTED, MISSED, RUNNING
from penstock.storage.database import migrate, reading

LONGEST_SLOT_S = 86400.0  # what another machine began longer ago has been given up
COMPONENT = "track"
STOPPED = "the tracker was stopped in it"

_METADATA = sa.MetaData()
SLOTS = sa.Table(
    "track_slots",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("series", sa.String(MAX_NAME_CHARS), nullable=False),  # provider/model
    sa.Column("scheduled_at", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("facts", sa.Text, nullable=False, default="{}"),  # region, precision, price as JSON
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.UniqueConstraint("series", "scheduled_at"),
)
REQUESTS = sa.Table(
    "track_requests",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("slot_id", sa.ForeignKey("track_slots.id"), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
)


def _create(connection: sa.Connection) -> None:
    _METADATA.create_all(connection)


MIGRATIONS = [_create]


class Slot(NamedTuple):
    """A slot as it is kept."""

    id: int
    series: str
    scheduled_at: int
    state: str
    reason: str | None
    facts: dict[str, Any]


class Book:
    """Slots and requests of a database."""

    def __init__(self, engine: sa.Engine) -> None:
        migrate(engine, COMPONENT, MIGRATIONS)
        self._engine = engine
        self._host = socket.gethostname()

    def close(self) -> None:
        self._engine.dispose()

    def last_slot(self, series: str) -> int | None:
        """When the newest slot of a series was, in whatever state."""
        with reading(self._engine) as connection:
            query = sa.select(sa.func.max(SLOTS.c.scheduled_at)).where(SLOTS.c.series == series)
            found: int | None = connection.scalar(query)
            return found

    def open_slot(self, series: str, scheduled_at: int, facts: dict[str, Any]) -> int | None:
        """Begin a slot; its id, or None if it was begun already, here or by another tracker."""
        values = {
            "state": RUNNING,
            "reason": None,
            "started_at": time.time(),
            "facts": msgspec.json.encode(facts).decode(),
            **self._who(),
        }
        insert = self._insert().values(series=series, scheduled_at=scheduled_at, **values)
        missed = insert.on_conflict_do_update(
            index_elements=("series", "scheduled_at"), set_=values, where=SLOTS.c.state == MISSED
        )
        with self._engine.begin() as connection:
            found: int | None = connection.scalar(missed.returning(SLOTS.c.id))
            return found

    def miss(self, series: Sequence[str], moments: Sequence[int], reason: str) -> None:
        """Write down that slots were missed; those that are there already stay as they are."""
        rows = [
            {
                "series": name,
                "scheduled_at": moment,
                "state": MISSED,
                "reason": reason,
                "facts": "{}",
                **self._who(),
            }
            for moment in moments
            for name in series
        ]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(self._insert().on_conflict_do_nothing(), rows)

    def _insert(self) -> sqlite.Insert | postgresql.Insert:
        if self._engine.dialect.name == "postgresql":
            return postgresql.insert(SLOTS)
        return sqlite.insert(SLOTS)

    def _who(self) -> dict[str, Any]:
        return {"host": self._host, "pid": os.getpid()}

    def close_slot(self, slot_id: int, state: str, reason: str | None = None) -> None:
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(SLOTS)
                .where(SLOTS.c.id == slot_id)
                .values(state=state, reason=reason, ended_at=time.time())
            )

    def add(self, slot_id: int, row: Request) -> None:
        """Keep a request; it is on the disk when this returns."""
        with self._engine.begin() as connection:
            record = msgspec.json.encode(row).decode()
            connection.execute(sa.insert(REQUESTS).values(slot_id=slot_id, record=record))

    def end_interrupted(self, lives: Callable[[int, float], bool]) -> int:
        """Close the slots that a tracker left when it was killed; how many.

        Those of other machines, whose processes nobody here sees, only when they are a day old: a
        container that is started again has another name.

        Args:
            lives: whether a process of this id lives, and did at that time (seconds since 1970).
        """
        mine = self._who()
        with self._engine.begin() as connection:
            found = connection.execute(sa.select(SLOTS).where(SLOTS.c.state == RUNNING)).all()
            dead = [
                row.id
                for row in found
                if (
                    row.pid == mine["pid"] or not lives(row.pid, row.started_at)
                    if row.host == mine["host"]
                    else row.started_at < time.time() - LONGEST_SLOT_S
                )
            ]
            if dead:
                connection.execute(
                    sa.update(SLOTS)
                    .where(SLOTS.c.id.in_(dead))
                    .values(state=INTERRUPTED, reason=STOPPED)
                )
        return len(dead)

    def slots(self, since: int = 0) -> list[Slot]:
        """Slots from a moment on, oldest first."""
        query = (
            sa.select(SLOTS)
            .where(SLOTS.c.scheduled_at >= since)
            .order_by(SLOTS.c.scheduled_at, SLOTS.c.series)
        )
        with reading(self._engine) as connection:
            return [
                Slot(
                    row.id,
                    row.series,
                    row.scheduled_at,
                    row.state,
                    row.reason,
                    msgspec.json.decode(row.facts),
                )
                for row in connection.execute(query)
            ]

    def requests(self, since: int = 0) -> Generator[tuple[int, Request], None, None]:
        """(slot id, request) of the slots from a moment on, in the order they were made."""
        query = (
            sa.select(REQUESTS.c.slot_id, REQUESTS.c.record)
            .join(SLOTS)
            .where(SLOTS.c.scheduled_at >= since)
            .order_by(REQUESTS.c.id)
        )
        yield from self._requests(query)

    def oldest_requests(
        self, series: str, before: int
    ) -> Generator[tuple[int, Request], None, None]:
        """(when its slot was, request) of a series before a moment, the oldest slots first."""
        query = (
            sa.select(SLOTS.c.scheduled_at, REQUESTS.c.record)
            .join(SLOTS)
            .where(SLOTS.c.series == series, SLOTS.c.scheduled_at < before)
            .order_by(SLOTS.c.scheduled_at, REQUESTS.c.id)
        )
        yield from self._requests(query)

    def _requests(self, query: sa.Select[Any]) -> Iterator[tuple[int, Request]]:
        decode = msgspec.json.Decoder(Request).decode
        with (
            reading(self._engine) as connection,
            connection.execution_options(yield_per=500).execute(query) as found,
        ):
            for number, record in found:
                yield number, decode(record)

"""The tracker itself: waits for slots, probes every series in each, and writes down what it missed.

Knows the schedule, the database and how to make targets; what is asked is in `probe`. A tracker
may be killed at any moment: what was answered is kept, the slot becomes `interrupted`, and the
slots that pass until the next start are rows of their own. Nothing that goes wrong with a series,
or with the database for a while, ends the tracker.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from penstock.errors import ConfigError, PenstockError
from penstock.measure.load.endpoint import Endpoint, api_key
from penstock.measure.load.target import Target
from penstock.measure.records import Clock, Request
from penstock.measure.track import states, tables
from penstock.measure.track.config import Config, Model, Provider
from penstock.measure.track.probe import CANARIES, Write, probe
from penstock.measure.track.schedule import slots_of

GRACE_S = 60.0  # a slot that begins later than this was missed
MAX_MISSED = 10_000  # rows for the slots of one series that passed at once, the newest ones
_BUSY = "the tracker was busy or asleep"
_LONGEST_SLEEP_S = 20.0  # the clock on the wall may be set, and a laptop may sleep

Connect = Callable[[Provider, Model, float], Any]  # like `connect_endpoint`
Say = Callable[[str], None]


def check_keys(config: Config) -> None:
    """See that every key that is named is there.

    Raises:
        ConfigError: one is not.
    """
    for provider in config.provider:
        if provider.api_key_env is not None and not os.environ.get(provider.api_key_env):
            raise ConfigError(
                f"`{provider.api_key_env}`, the key of provider `{provider.name}`, is not set."
            )


async def connect_endpoint(provider: Provider, model: Model, timeout_s: float) -> Target:
    """The endpoint of a series, connected.

    Raises:
        ConfigError: it does not answer.
    """
    target = Endpoint(
        provider.url,
        model=model.name,
        dialect=provider.dialect,
        api_key=api_key(provider.api_key_env) if provider.api_key_env else None,
        timeout_s=timeout_s,
        probe=False,
    )
    try:
        await target.connect()
    except BaseException:
        await target.close()
        raise
    return target


def read_canaries(path: str | None) -> list[str]:
    """The canary prompts of a file, one a line; our own without one.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    if path is None:
        return list(CANARIES)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`probe.canaries` = `{path}` cannot be read: {error}.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"`probe.canaries` = `{path}` holds no prompt.")
    return found


class Tracker:
    """Probes the series of a configuration."""

    def __init__(
        self,
        config: Config,
        book: tables.Book,
        *,
        price_facts: Callable[[Provider, Model], dict[str, Any]],
        alarms: Callable[[], Collection[str]] = list,
        connect: Connect = connect_endpoint,
        say: Say = lambda text: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Make one.

        Args:
            price_facts: what a series costs today, to be kept with each slot; {} if not known.
            alarms: which there are now; called in a thread after each slot.
            say: is told of every slot, a line.
            now: seconds since 1970.
        """
        self._config = config
        self._book = book
        self._price_facts = price_facts
        self._alarms = alarms
        self._announced: Collection[str] = ()
        self._connect = connect
        self._say = say
        self._now = now
        self._slots = slots_of(config.schedule)
        self._canaries = read_canaries(config.probe.canaries)

    async def run(self, *, num_slots: int | None = None) -> None:
        """Probe slot after slot; for ever, or so many."""
        self.settle()
        probed = 0
        last = int(self._now())
        while num_slots is None or probed < num_slots:
            last = min(last, int(self._now()))  # the clock may have been set back
            await self._wait_until(next(self._slots(last)))
            # While the machine slept, or the slot before took too long, more may have passed.
            passed = self._passed(last)
            if not passed:
                continue
            last = passed[-1]
            is_late = self._now() - last > GRACE_S
            try:
                self._book.miss(self._names(), passed if is_late else passed[:-1], _BUSY)
                if not is_late:
                    await self.slot(last)
            except SQLAlchemyError as error:
                self._say(f"the database fails, and slot {last} is lost: {_told(error)}")
            probed += not is_late

    def settle(self) -> None:
        """Write down what happened while no tracker ran."""
        if num := self._book.end_interrupted(_lives):
            self._say(f"{num} slots were interrupted")
        for name in self._names():
            last = self._book.last_slot(name)
            missed = [] if last is None else self._passed(last)
            # One that another tracker has just come to, it may still probe: see `open_slot`.
            self._book.miss([name], missed, "no tracker probed it")
            if missed:
                self._say(f"{name}: {len(missed)} slots were missed")

    async def slot(self, scheduled_at: int) -> None:
        """Probe every series now, in an order that the slot decides, one after another.

        Raises:
            SQLAlchemyError: the database fails.
        """
        self._book.end_interrupted(_lives)  # what this tracker could not close
        order = list(self._config.series)
        random.Random(scheduled_at).shuffle(order)
        for provider, model in order:
            await self._probe_series(provider, model, scheduled_at)
        there = await asyncio.to_thread(self._alarms)
        for alarm in there:
            if alarm not in self._announced:
                self._say(f"ALARM: {alarm}")
        self._announced = there

    async def _probe_series(self, provider: Provider, model: Model, scheduled_at: int) -> None:
        name = f"{provider.name}/{model.name}"
        facts = {"region": provider.region, "precision": model.precision}
        facts |= self._price_facts(provider, model)
        slot_id = self._book.open_slot(name, scheduled_at, facts)
        if slot_id is None:
            self._say(f"{name}: another tracker has this slot")
            return
        state, reason = states.INTERRUPTED, tables.STOPPED
        counts = {"ok": 0, "failed": 0}
        kept: list[Future[None]] = []
        # A commit takes milliseconds, in which the event loop would not time what arrives.
        disk = ThreadPoolExecutor(1)

        def write(row: Request) -> None:
            row.arm, row.provider, row.region = name, provider.name, provider.region
            row.model, row.precision = model.name, model.precision
            counts["ok" if row.ok else "failed"] += 1
            kept.append(disk.submit(self._book.add, slot_id, row))

        try:
            await self._ask(provider, model, str(scheduled_at), write)
            state, reason = states.DONE, ""
        except PenstockError as error:  # nobody answers: a finding, not the end of the tracker
            state, reason = states.FAILED, error.message
        except Exception as error:  # noqa: BLE001  # nor is a fault of our own
            reason = _told(error)
        finally:
            disk.shutdown()
            self._book.close_slot(slot_id, state, reason or None)
        for one in kept:
            one.result()
        if state == states.FAILED and not any(counts.values()):
            self._say(f"{name}: slot failed before a request was sent: {reason}")
            return
        told = f": {reason}" if reason else ""
        self._say(f"{name}: slot {state}; {counts['ok']} answered, {counts['failed']} not{told}")

    async def _ask(self, provider: Provider, model: Model, seed: str, write: Write) -> None:
        target = await self._connect(provider, model, self._config.probe.timeout_s)
        try:
            await probe(
                target, self._config.probe, self._canaries, seed=seed, clock=Clock(), write=write
            )
        finally:
            await target.close()

    async def _wait_until(self, moment: int) -> None:
        while (left_s := moment - self._now()) > 0:  # noqa: ASYNC110  # a time, not an event
            await asyncio.sleep(min(left_s, _LONGEST_SLEEP_S))

    def _passed(self, after: int) -> Sequence[int]:
        """The slots after a moment that have come, oldest first; of very many the newest."""
        now, newest, num = self._now(), deque[int](maxlen=MAX_MISSED), 0
        for moment in self._slots(after):
            if moment > now:
                break
            newest.append(moment)
            num += 1
        if num > MAX_MISSED:
            self._say(f"{num - MAX_MISSED} slots more were missed than are written down")
        return list(newest)

    def _names(self) -> list[str]:
        return [f"{provider.name}/{model.name}" for provider, model in self._config.series]


def _lives(pid: int, since_s: float) -> bool:
    """Whether a process lives that was there at a time (seconds since 1970): ids are used again."""
    import psutil

    try:
        return bool(psutil.Process(pid).create_time() <= since_s + 1)
    except psutil.Error:
        return False


def _told(error: BaseException) -> str:
    """The first line of an error, without what a database adds: statements and their values."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"

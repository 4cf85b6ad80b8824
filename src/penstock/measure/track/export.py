"""From a tracker's database to a run: header and records, of which everything shown is computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.environment import redact_text
from penstock.measure.meters import prices
from penstock.measure.meters.price_lists import Price
from penstock.measure.records import Arm, Header, Mark, Record, Request
from penstock.measure.run import Writer, new_header
from penstock.measure.track.config import Config, Model, Provider
from penstock.measure.track.figures import figures, sentence
from penstock.measure.track.probe import CANARY, FIRST_TOKEN
from penstock.measure.track.schedule import per_year, slots_of
from penstock.measure.track.tables import Book


def header_of(config: Config, since: int) -> Header:
    """The header of a run with the slots from `since` (seconds since 1970) on."""
    arms = [
        Arm(
            name=f"{provider.name}/{model.name}",
            target=redact_text(provider.url),
            model=model.name,
            precision=model.precision,
            provider=provider.name,
        )
        for provider, model in config.series
    ]
    alarm = config.alarm
    settings = {
        "since": since,
        "false_alarms_per_year": alarm.false_alarms_per_year,
        "window_slots": alarm.window_slots,
        "reference_slots": alarm.reference_slots,
        "slots_per_year": per_year(slots_of(config.schedule), since),
        "references": {
            f"{provider.name}/{model.name}": model.reference
            for provider, model in config.series
            if model.reference is not None
        },
    }
    return new_header("track", settings=settings, arms=arms)


def records_of(config: Config, book: Book, since: int) -> list[Record]:
    """Slots and requests from a moment on, in the order of their slots.

    Before them, of each series that is its own reference, the canaries of its first slots.
    """
    slots = {slot.id: slot for slot in book.slots(since)}
    names = {slot.series for slot in slots.values()}
    others = {f"{provider.name}/{m.name}" for provider, m in config.series if m.reference}
    records: list[Record] = []
    for name in sorted(names - others):
        records += _first_canaries(book, name, since, config.alarm.reference_slots)
    records += [
        Mark(
            t_ns=0,  # each slot has a clock of its own
            arm=slot.series,
            stage=str(slot.scheduled_at),
            name="slot",
            facts={"state": slot.state, "reason": slot.reason, **slot.facts},
        )
        for slot in slots.values()
    ]
    for slot_id, row in book.requests(since):
        if slot_id in slots:  # else it began since we asked
            row.stage = str(slots[slot_id].scheduled_at)
            records.append(row)
    return records


def _first_canaries(book: Book, series: str, before: int, num_slots: int) -> list[Request]:
    """The canaries of the first slots of a series in which one was answered."""
    found: list[Request] = []
    answered: set[int] = set()
    with closing(book.oldest_requests(series, before)) as rows:
        for slot, row in rows:
            if row.task not in (CANARY, FIRST_TOKEN) or not row.ok:
                continue
            if len(answered) == num_slots and slot not in answered:
                break
            if row.task == CANARY:
                answered.add(slot)
            row.stage = str(slot)
            found.append(row)
    return [row for row in found if int(row.stage) in answered]


def export(config: Config, book: Book, since: int, directory: Path | None) -> Path:
    """Write a run of what was tracked; its directory.

    Raises:
        ConfigError: there is no slot since then, or the directory cannot be written.
    """
    records = records_of(config, book, since)
    if not any(isinstance(record, Mark) for record in records):
        raise ConfigError("The database has no slot in this time.", hint="--days reaches further")
    with Writer(header_of(config, since), directory) as writer:
        for record in records:
            writer.add(record)
        return writer.path


def alarms(config: Config, book: Book, now: float) -> list[str]:
    """The alarms of the newest slots, a sentence each."""
    slots_a_year = per_year(slots_of(config.schedule), int(now))
    window_s = config.alarm.window_slots / slots_a_year * 366 * 86400
    since = int(now - 3 * window_s)  # slots that were missed do not count
    found, _ = figures(header_of(config, since), records_of(config, book, since))
    return [sentence(drift) for drift in found["drift"] if drift["alarm"]]


def price_facts(config: Config) -> Callable[[Provider, Model], dict[str, Any]]:
    """What tells what a series costs today, as a slot keeps it: the price, or why there is none.

    Raises:
        ConfigError: the file of prices is wrong.
    """
    lists = prices.load(Path(config.prices) if config.prices is not None else None)

    def facts(provider: Provider, model: Model) -> dict[str, Any]:
        named = model.price_provider
        known = prices.provider_of(provider.url)
        found: Price | prices.NoPrice = prices.NoPrice(reason="")
        for seller in (named,) if named else (provider.name, known):
            if seller and isinstance(found, prices.NoPrice):
                found = lists.find(seller, model.price_model or model.name)
        if isinstance(found, prices.NoPrice):
            return {"price": None, "no_price": found.reason}
        return {"price": msgspec.to_builtins(found)}

    return facts

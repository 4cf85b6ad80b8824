"""`penstock track`: probe providers on a schedule, and show what the probes found."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli import runs

if TYPE_CHECKING:
    from penstock.measure.track.config import Config
    from penstock.measure.track.tables import Book

_FILE = click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_DAYS = click.option(
    "--days", type=click.FloatRange(min=0, min_open=True), default=7.0, show_default=True,
    help="How far back to look.",
)  # fmt: skip
_DATABASE = click.option(
    "--database", envvar="PENSTOCK_TRACK_DATABASE", help="Path or URL; overrides the file's."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")


@click.group(epilog="Example: penstock track run track.toml")
def command() -> None:
    """Probe many providers and models on a schedule; keep every answer and every failure.

    CONFIG is a TOML file: a [schedule], [[provider]]s with their [[provider.model]]s, and if you
    like [probe] and [alarm].
    """


@command.command(epilog="Example: penstock track run track.toml --slots 1")
@_FILE
@click.option("--slots", type=click.IntRange(min=1), help="End after so many. Default: never.")
@click.option("--now", "at_once", is_flag=True, help="Probe once now, and end.")
@_DATABASE
@click.option("--json", "as_json", is_flag=True, help="Tell what happens as JSON lines on stdout.")
def run(
    config: Path, slots: int | None, at_once: bool, database: str | None, as_json: bool
) -> None:
    """Wait for the schedule's slots and probe every series in each."""
    from penstock.measure.track.export import alarms, price_facts
    from penstock.measure.track.service import Tracker, check_keys

    if at_once and slots is not None:
        raise click.UsageError("--now and --slots exclude one another.")
    told, book = _open(config, database)
    with closing(book):
        with runs.usage():
            check_keys(told)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: slots are closed
        tracker = Tracker(
            told,
            book,
            price_facts=price_facts(told),
            alarms=lambda: alarms(told, book, time.time()),
            say=_say_json if as_json else _say,
        )
        if at_once:
            tracker.settle()
            asyncio.run(tracker.slot(int(time.time())))
        else:
            asyncio.run(tracker.run(num_slots=slots))


def _say(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


def _say_json(line: str) -> None:
    click.echo(json.dumps({"time": round(time.time(), 3), "message": line}))


@command.command(epilog="Example: penstock track show track.toml --days 3 --json")
@_FILE
@_DAYS
@_DATABASE
@_JSON
@click.option("--strict", is_flag=True, help="Exit with status 4 if there is an alarm.")
def show(config: Path, days: float, database: str | None, as_json: bool, strict: bool) -> int:
    """The leaderboard: speed, failures, price and drift of each series."""
    from penstock.measure.kinds import compute
    from penstock.measure.track.export import header_of, records_of

    told, book = _open(config, database, create=False)
    with closing(book):
        since = _since(days)
        figures, _ = compute(header_of(told, since), records_of(told, book, since))
    if as_json:
        click.echo(json.dumps(figures))
    else:
        for line in leaderboard(figures):
            click.echo(line)
    alarm = strict and any(drift["alarm"] for drift in figures["drift"])
    return runs.BAD if alarm else runs.OK


@command.command(epilog="Example: penstock track export track.toml -o week && penstock verify week")
@_FILE
@_DAYS
@_DATABASE
@_JSON
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Directory of the run.")
def export(
    config: Path, days: float, database: str | None, as_json: bool, output: Path | None
) -> int:
    """Write what was tracked as a run: raw records, figures, and a page.

    `penstock results export` makes CSV or Parquet of it, `penstock verify` computes it again.
    """
    from penstock.measure.kinds import finish
    from penstock.measure.track import export as exporting

    told, book = _open(config, database, create=False)
    with closing(book):
        path = exporting.export(told, book, _since(days), output)
    made = finish(path)
    return runs.tell(path, made, lambda: "\n".join(leaderboard(made.figures)), as_json=as_json)


@command.command(epilog="Example: penstock track check track.toml")
@_FILE
@_JSON
def check(config: Path, as_json: bool) -> None:
    """Read the file and say what would be probed when, without asking anybody."""
    from itertools import islice

    from penstock.measure.track.config import read_config
    from penstock.measure.track.schedule import slots_of
    from penstock.measure.track.service import read_canaries

    with runs.usage():
        told = read_config(config)
    probe = told.probe
    num_cells = len(probe.input_tokens) * len(probe.output_tokens)
    num_speed = num_cells * sum(probe.concurrency) * probe.rounds
    num_canaries = len(read_canaries(probe.canaries))
    found: dict[str, Any] = {
        "next_slots": [
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(slot))
            for slot in islice(slots_of(told.schedule)(int(time.time())), 3)
        ],
        "series": [f"{provider.name}/{model.name}" for provider, model in told.series],
        "requests_per_series_and_slot": {
            "speed": num_speed,
            "canaries": num_canaries,
            "first_tokens": num_canaries * probe.first_token_samples,
        },
    }
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"next slots: {', '.join(found['next_slots'])}")
    click.echo(f"series: {', '.join(found['series'])}")
    for what, num in found["requests_per_series_and_slot"].items():
        click.echo(f"requests a series and slot, {what}: {num}")


def _open(config: Path, database: str | None, *, create: bool = True) -> tuple[Config, Book]:
    """The file and its database; who only reads makes none."""
    from penstock.errors import ConfigError
    from penstock.measure.track.config import read_config
    from penstock.measure.track.tables import COMPONENT, Book
    from penstock.storage.database import holds, open_database

    with runs.usage():
        told = read_config(config)
    engine = open_database(database or told.database, create=create)
    if not create and not holds(engine, COMPONENT):
        engine.dispose()
        raise ConfigError(
            "The database holds nothing of a tracker.", hint=f"penstock track run {config}"
        )
    return told, Book(engine)


def _since(days: float) -> int:
    return int(time.time() - days * 86400)


def leaderboard(figures: Mapping[str, Any]) -> list[str]:
    """The leaderboard for a terminal."""
    from penstock.measure.track.figures import drift_summary

    head = (
        f"{'series':32} {'in/out x at once':>18} {'n':>5} {'TTFT p50':>9} {'p90':>8} {'p99':>8} "
        f"{'tok/s p50':>9} {'p10':>7} {'available':>9} {'$/1M out':>9}"
    )
    lines = [head]
    for name, series in figures["series"].items():
        for cell in series["cells"]:
            shape = f"{cell['input_tokens']}/{cell['output_tokens']} x {cell['concurrency']}"
            ttft, speed = cell["ttft_s"], cell["tokens_per_s"]
            lines.append(
                f"{name[:32]:32} {shape:>18} {ttft['n']:>5} {_told(ttft['p50'], '.3f', ' s'):>9} "
                f"{_told(ttft['p90'], '.3f', ' s'):>8} {_told(ttft['p99'], '.3f', ' s'):>8} "
                f"{_told(speed['p50'], '.1f'):>9} "
                f"{_told(speed['p10'], '.1f'):>7} {_told(cell['availability'], '.1%'):>9} "
                f"{_told(cell['usd_per_1m_output_tokens'], '.2f'):>9}"
            )
        if not series["cells"]:  # nobody was there to be asked
            blank = " ".join(f"{'-':>{width}}" for width in (18, 5, 9, 8, 8, 9, 7))
            lines.append(
                f"{name[:32]:32} {blank} {_told(series['availability'], '.1%'):>9} {'-':>9}"
            )
        failed = ", ".join(f"{kind} {num}" for kind, num in series["errors"].items()) or "none"
        slots = ", ".join(f"{state} {num}" for state, num in series["slots"].items())
        lines.append(f"{name[:32]:32} slots: {slots}; failures: {failed}")
        lines += [f"{name[:32]:32} {num} slots: {why}" for why, num in series["reasons"].items()]
        if series["no_price"]:
            lines.append(f"{name[:32]:32} no price: {series['no_price']}")
    if not figures["series"]:
        return ["No slot yet in this time (--days reaches further)."]
    for drift in figures["drift"]:
        if drift["p_value"] is None:
            continue
        verdict = "ALARM" if drift["alarm"] else "no drift"
        lines.append(
            f"{drift['series'][:32]:32} {drift['what']} against {drift['reference']}: {verdict} "
            f"(p = {drift['p_value']:.2g}, alarm below {drift['alpha']:.2g})"
        )
    return [*lines, drift_summary(figures["drift"])]


def _told(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"

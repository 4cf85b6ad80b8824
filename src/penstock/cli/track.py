"""`penstock track`: probe providers on a schedule, and show what the probes found."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
def run(config: Path, slots: int | None, at_once: bool, database: str | None) -> None:
    """Wait for the schedule's slots and probe every series in each."""
    from penstock.measure.track.export import price_facts
    from penstock.measure.track.service import Tracker, check_keys

    if at_once and slots is not None:
        raise click.UsageError("--now and --slots exclude one another.")
    told, book = _open(config, database)
    with closing(book):
        check_keys(told)
        tracker = Tracker(
            told,
            book,
            price_facts=price_facts(told),
            say=lambda line: click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True),
        )
        if at_once:
            tracker.settle()
            asyncio.run(tracker.slot(int(time.time())))
        else:
            asyncio.run(tracker.run(num_slots=slots))


@command.command(epilog="Example: penstock track show track.toml --days 3 --json")
@_FILE
@_DAYS
@_DATABASE
@_JSON
@click.option("--strict", is_flag=True, help="Exit with status 1 if there is an alarm.")
def show(config: Path, days: float, database: str | None, as_json: bool, strict: bool) -> int:
    """The leaderboard: speed, failures, price and drift of each series."""
    from penstock.measure.kinds import compute
    from penstock.measure.track.export import header_of, records_of

    told, book = _open(config, database)
    with closing(book):
        since = _since(days)
        figures, _ = compute(header_of(told, since), records_of(told, book, since))
    if as_json:
        click.echo(json.dumps(figures))
    else:
        for line in _lines(figures):
            click.echo(line)
    return 1 if strict and any(drift["alarm"] for drift in figures["drift"]) else 0


@command.command(epilog="Example: penstock track export track.toml -o week && penstock verify week")
@_FILE
@_DAYS
@_DATABASE
@_JSON
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Directory of the run.")
def export(
    config: Path, days: float, database: str | None, as_json: bool, output: Path | None
) -> None:
    """Write what was tracked as a run: raw records, figures, and a page.

    `penstock results export` makes CSV or Parquet of it, `penstock verify` computes it again.
    """
    from penstock.measure.kinds import finish
    from penstock.measure.track import export as exporting

    told, book = _open(config, database)
    with closing(book):
        path = exporting.export(told, book, _since(days), output)
    made = finish(path)
    if as_json:
        click.echo(json.dumps({"run": str(path), "figures": made.figures}))
    else:
        click.echo(str(path))


@command.command(epilog="Example: penstock track check track.toml")
@_FILE
@_JSON
def check(config: Path, as_json: bool) -> None:
    """Read the file and say what would be probed when, without asking anybody."""
    from itertools import islice

    from penstock.measure.track.config import read_config
    from penstock.measure.track.schedule import slots_of
    from penstock.measure.track.service import read_canaries

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


def _open(config: Path, database: str | None) -> tuple[Config, Book]:
    from penstock.measure.track.config import read_config
    from penstock.measure.track.tables import Book
    from penstock.storage.database import open_database

    told = read_config(config)
    return told, Book(open_database(database or told.database))


def _since(days: float) -> int:
    return int(time.time() - days * 86400)


def _lines(figures: dict[str, Any]) -> list[str]:
    """The leaderboard for a terminal."""
    head = (
        f"{'series':32} {'in/out x at once':>18} {'n':>5} {'TTFT p50':>9} {'p90':>8} "
        f"{'tok/s p50':>9} {'p10':>7} {'answered':>8} {'$/1M out':>9}"
    )
    lines = [head]
    for name, series in figures["series"].items():
        for cell in series["cells"]:
            shape = f"{cell['input_tokens']}/{cell['output_tokens']} x {cell['concurrency']}"
            ttft, speed = cell["ttft_s"], cell["tokens_per_s"]
            answered = cell["availability"]
            lines.append(
                f"{name[:32]:32} {shape:>18} {ttft['n']:>5} {_told(ttft['p50'], '.3f', ' s'):>9} "
                f"{_told(ttft['p90'], '.3f', ' s'):>8} {_told(speed['p50'], '.1f'):>9} "
                f"{_told(speed['p10'], '.1f'):>7} {_told(answered, '.1%'):>8} "
                f"{_told(cell['usd_per_1m_output_tokens'], '.2f'):>9}"
            )
        failed = ", ".join(f"{kind} {num}" for kind, num in series["errors"].items()) or "none"
        slots = ", ".join(f"{state} {num}" for state, num in series["slots"].items())
        lines.append(f"{name[:32]:32} slots: {slots}; failures: {failed}")
        lines += [f"{name[:32]:32} {num} slots: {why}" for why, num in series["reasons"].items()]
        if series["no_price"]:
            lines.append(f"{name[:32]:32} no price: {series['no_price']}")
    for drift in figures["drift"]:
        if drift["p_value"] is None:
            continue
        verdict = "ALARM" if drift["alarm"] else "no drift"
        lines.append(
            f"{drift['series'][:32]:32} {drift['what']} against {drift['reference']}: {verdict} "
            f"(p = {drift['p_value']:.2g}, alarm below {drift['alpha']:.2g})"
        )
    return lines


def _told(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"

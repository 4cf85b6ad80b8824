"""`penstock bench serve` and `penstock bench sweep`: a load on one target, and its report.

An interrupted run has the figures of what was finished. How a run ends is said in `runs`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from penstock.cli import runs
from penstock.cli.options import build, options_of
from penstock.errors import ConfigError
from penstock.measure.load import settings as load_settings
from penstock.measure.load.settings import LoadSettings
from penstock.measure.meters.settings import MeterSettings

Command = TypeVar("Command", bound=Callable[..., Any])
Number = TypeVar("Number", int, float)
_EXAMPLE = "http://127.0.0.1:8000"


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """How the target is asked."""

    model: str | None = field(default=None, metadata={"help": "Default: the first it names."})
    dialect: str = field(
        default="auto",
        metadata={
            "help": "What it speaks.",
            "choices": ("auto", "openai-chat", "openai-completions", "tgi"),
        },
    )
    api_key_env: str | None = field(
        default=None,
        metadata={
            "help": "Variable that holds the key. Default: PENSTOCK_API_KEY, then OPENAI_API_KEY."
        },
    )
    header_env: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "A header whose value a variable holds, as NAME=VARIABLE: api-key=AZURE_KEY."
        },
    )
    timeout: float = field(default=600.0, metadata={"help": "Seconds for one answer."})
    provider: str | None = field(
        default=None, metadata={"help": "Whose price list is used. Default: by the address."}
    )
    idle: float = field(
        default=0.0,
        metadata={"help": "Seconds of rest before the load, whose power is subtracted."},
    )


def _common(command: Command) -> Command:
    """Options of both commands."""
    made: Any = command
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON."),
        click.option(
            "--output",
            "-o",
            type=click.Path(file_okay=False, path_type=Path),
            help="Directory of the run. Default: a new one in PENSTOCK_RUNS or ./penstock-runs.",
        ),
        options_of(MeterSettings),
        options_of(TargetSettings, from_environment=False),
        options_of(LoadSettings, from_environment=False),
        click.argument("target"),
    ):
        made = decorate(made)
    return made  # type: ignore[no-any-return]


@click.command(epilog=f"Example: penstock bench {_EXAMPLE} --request-rate 4 --slo ttft_p95=0.5s")
@_common
def serve(target: str, output: Path | None, as_json: bool, **options: Any) -> int:
    """One load on TARGET: a URL, or an arm such as penstock:brook that is started for it.

    Open loop (--request-rate, --rate-schedule, --trace) shows what users would wait; closed loop
    (--concurrency) what so many clients get. Times are counted from the moment a request was due.

    \b
    Exit status: 0 fine, 1 an error, 2 wrong usage, 3 the run is not valid, 4 a limit is broken.
    """
    settings = build(LoadSettings, options)
    with runs.usage():
        load_settings.check(settings)

    async def work(bench: Any) -> None:
        await bench.serve()

    return _run(target, settings, options, output, as_json, work)


@click.command(epilog=f"Example: penstock bench sweep {_EXAMPLE} --slo ttft_p95=0.5s,tpot_p95=50ms")
@_common
@click.option("--rates", help="Open loop: rates to try, such as 1,2,4,8.")
@click.option("--concurrencies", help="Closed loop: numbers of clients to try, such as 1,4,16.")
@click.option(
    "--most-clients",
    type=click.IntRange(min=1),
    help="Where a sweep of clients ends that has found no saturation.  [default: 256]",
)
@click.option(
    "--most-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="No higher rate is searched.",
)
@click.option(
    "--precision",
    type=click.FloatRange(min=0, min_open=True),
    help="A search ends when the failing rate is this share above the passing one.  "
    "[default: 0.05]",
)
def sweep(target: str, output: Path | None, as_json: bool, **options: Any) -> int:
    """Loads on TARGET up to saturation; with --slo, the highest rate that keeps the limits.

    Without --rates, --concurrencies or --slo: 1, 2, 4, ... clients until throughput rises no more.
    With limits over many requests in --slo, such as ttft_p95: rates are doubled until one breaks,
    then the bracket is halved. --duration is that of one stage.

    \b
    Exit status: 0 fine, 1 an error, 2 wrong usage, 3 the run is not valid, 4 a limit is broken (by
    every rate of a search).
    """
    from penstock.measure.load import search, slo

    settings = build(LoadSettings, options)
    with runs.usage():
        rates = _numbers(options["rates"], "--rates", float)
        clients = _numbers(options["concurrencies"], "--concurrencies", int)
        points = [search.Point(rate=rate) for rate in rates]
        points += [search.Point(concurrency=number) for number in clients]
        searches = not points and bool(slo.over_many(settings.limits))
        _check_sweep(settings, options, has_points=bool(points), searches=searches)
        load_settings.check(settings, sweeps_rates=bool(rates) or searches)
    most_rate = math.inf if options["most_rate"] is None else options["most_rate"]

    async def work(bench: Any) -> None:
        if searches:
            await bench.search(
                start=settings.request_rate,
                most=most_rate,
                precision=options["precision"] or 0.05,
            )
        else:
            await bench.sweep(points or search.clients_up_to(options["most_clients"] or 256))

    names = ("rates", "concurrencies", "precision", "most_clients", "most_rate")
    asked = {name: options[name] for name in names}
    return _run(target, settings, options, output, as_json, work, sweep=asked)


def _check_sweep(
    settings: LoadSettings, options: dict[str, Any], *, has_points: bool, searches: bool
) -> None:
    if options["rates"] and options["concurrencies"]:
        raise ConfigError("`--rates` and `--concurrencies` exclude one another.")
    for name in ("trace", "rate_schedule", "concurrency"):
        if getattr(settings, name) is not None:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` is one load, and `bench sweep` makes several.",
                hint="use `penstock bench serve`",
            )
    hint = "a search takes a limit over many requests, such as `--slo ttft_p95=0.5s`, and no list"
    if settings.request_rate is not None and not searches:
        raise ConfigError("`--request-rate` of a sweep is where a search begins.", hint=hint)
    if settings.request_rate is not None and math.isinf(settings.request_rate):
        raise ConfigError("A search cannot begin at the `--request-rate inf`.")
    for name in ("most_rate", "precision"):
        value = options[name]
        if value is not None and not searches:
            raise ConfigError(f"`--{name.replace('_', '-')}` goes with a search.", hint=hint)
        if value is not None and math.isnan(value):
            raise ConfigError(f"`--{name.replace('_', '-')} nan` is no number.")
    if options["most_clients"] is not None and (has_points or searches):
        raise ConfigError("`--most-clients` goes with a sweep of clients that has no list.")


def _numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")] if text else []
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"`{option} {text}` is no list of {what}, such as 1,2,4.") from None
    if len({f"{number:g}" for number in numbers}) < len(numbers):  # stages are called by them
        raise ConfigError(f"`{option} {text}` has a number twice.")
    return numbers


def _run(
    target: str,
    settings: LoadSettings,
    options: dict[str, Any],
    output: Path | None,
    as_json: bool,
    work: Callable[[Any], Any],
    sweep: dict[str, Any] | None = None,
) -> int:
    """Run the bench, make its figures, print them."""
    from penstock.cli import bench_print
    from penstock.measure.load.session import Refused, Session

    runs.check_output(output)
    with runs.usage():
        session = Session(
            target,
            settings,
            meters=build(MeterSettings, options),
            output=output,
            sweep=sweep,
            **{name: options[name] for name in TargetSettings.__dataclass_fields__},
        )
    try:
        made, interrupted = runs.measured(session, session.run(work), _quick_loop())
    except Refused as error:
        raise click.UsageError(str(error)) from None
    broken = any(not one["kept"] for stage in made.figures["stages"] for one in stage["slo"])
    if made.figures["search"]:
        broken = made.figures["search"]["highest_passing"] is None
    assert session.path is not None
    return runs.tell(
        session.path,
        made,
        lambda: bench_print.text(made.figures),
        as_json=as_json,
        bad=broken,
        interrupted=interrupted,
    )


def _quick_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed: it halves the lateness of the client."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop

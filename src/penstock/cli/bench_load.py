"""`penstock bench serve` and `penstock bench sweep`: a load on one target, and its report.

Results go to stdout, progress to stderr. Exit status 1 where the run is not valid or a limit is
broken; an interrupted run has the figures of what was finished.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from penstock.cli.options import build, options_of
from penstock.errors import ConfigError
from penstock.measure.load import settings as load_settings
from penstock.measure.load.settings import LoadSettings
from penstock.measure.meters.settings import MeterSettings

Command = TypeVar("Command", bound=Callable[..., Any])
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
        options_of(TargetSettings),
        options_of(LoadSettings),
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
    """
    settings = build(LoadSettings, options)
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
    default=256,
    show_default=True,
    help="Where a sweep of clients ends that has found no saturation.",
)
@click.option("--most-rate", type=float, default=math.inf, help="No higher rate is searched.")
@click.option(
    "--precision",
    type=click.FloatRange(min=0, min_open=True),
    default=0.05,
    show_default=True,
    help="The search ends when the failing rate is this share above the passing one.",
)
def sweep(target: str, output: Path | None, as_json: bool, **options: Any) -> int:
    """Loads on TARGET up to saturation; with --slo, the highest rate that keeps the limits.

    Without --rates, --concurrencies or --slo: 1, 2, 4, ... clients until throughput rises no more.
    With --slo: rates are doubled until the limits break, then the bracket is halved. --duration is
    that of one stage.
    """
    from penstock.measure.load import search, slo

    settings = build(LoadSettings, options)
    _check_sweep(settings, options)
    rates = _numbers(options["rates"], "--rates")
    clients = _numbers(options["concurrencies"], "--concurrencies")
    points = [search.Point(rate=rate) for rate in rates]
    points += [search.Point(concurrency=round(number)) for number in clients]
    searches = not points and bool(slo.over_many(settings.limits))
    load_settings.check(settings, sweeps_rates=bool(rates) or searches)

    async def work(bench: Any) -> None:
        if searches:
            await bench.search(
                start=settings.request_rate,
                most=options["most_rate"],
                precision=options["precision"],
            )
        else:
            await bench.sweep(points or search.clients_up_to(options["most_clients"]))

    names = ("rates", "concurrencies", "precision", "most_clients")
    asked = {name: options[name] for name in names} | {"most_rate": str(options["most_rate"])}
    return _run(target, settings, options, output, as_json, work, sweep=asked)


def _check_sweep(settings: LoadSettings, options: dict[str, Any]) -> None:
    if options["rates"] and options["concurrencies"]:
        raise ConfigError("`--rates` and `--concurrencies` exclude one another.")
    for name in ("trace", "rate_schedule", "concurrency"):
        if getattr(settings, name) is not None:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` is one load, and `bench sweep` makes several.",
                hint="use `penstock bench serve`",
            )
    listed = options["rates"] or options["concurrencies"]
    if settings.request_rate is not None and (listed or not settings.slo):
        raise ConfigError("`--request-rate` of a sweep is where a search (--slo) begins.")


def _numbers(text: str | None, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError
    except ValueError:
        raise ConfigError(f"`{option} {text}` is no list of numbers, such as 1,2,4.") from None
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
    from penstock.measure.kinds import finish
    from penstock.measure.load.session import Session

    session = Session(
        target,
        settings,
        meters=build(MeterSettings, options),
        output=output,
        sweep=sweep,
        **{name: options[name] for name in TargetSettings.__dataclass_fields__},
    )
    interrupted = False
    try:
        with asyncio.Runner(loop_factory=_quick_loop()) as runner:
            runner.run(session.run(work))
    except KeyboardInterrupt:
        interrupted = True
    if session.path is None:
        raise KeyboardInterrupt
    made = finish(session.path)
    if as_json:
        told = {"run": str(session.path), "problems": made.problems, "figures": made.figures}
        click.echo(json.dumps(told))
    else:
        click.echo(bench_print.text(made.figures, made.problems, session.path))
    if interrupted:
        raise KeyboardInterrupt
    broken = any(not one["kept"] for stage in made.figures["stages"] for one in stage["slo"])
    if made.figures["search"]:
        broken = made.figures["search"]["highest_passing"] is None
    return 1 if made.problems or broken else 0


def _quick_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed: it halves the lateness of the client."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop

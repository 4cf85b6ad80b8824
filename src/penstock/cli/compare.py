"""`penstock compare`: is B better than A, not worse, worse, or can that not be told?

Exit status: 0 better or not worse, 1 an error, 2 wrong usage (nothing was measured), 3 cannot be
told or the run is not valid, 4 worse, 130 stopped; `penstock.cli.runs` has them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from penstock.cli import runs
from penstock.cli.options import build, options_of
from penstock.errors import ConfigError
from penstock.measure.meters.settings import MeterSettings, tables_dir
from penstock.measure.run import HEADER
from penstock.measure.verdict.settings import LoadSettings, RuleSettings

if TYPE_CHECKING:
    from penstock.measure.verdict.run import Measurement

OF_RUNS = {"a", "b", "output", "as_json", "seed"} | {
    field.name for field in dataclasses.fields(RuleSettings)
}  # options that say something of two finished runs
_EXAMPLE = (
    "Example: penstock compare brook 'brook?quantization=int8' --tasks brook --max-drop 1 "
    "--usd-per-hour 0.10"
)


@click.command(epilog=_EXAMPLE)
@click.argument("a")
@click.argument("b")
@click.option("--tasks", help="What is graded, by commas, as in `penstock eval`: brook,gsm8k.")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="JSONL with `prompt` or `messages`, `reference`, `grader`; several are several tasks.",
)
@options_of(LoadSettings)
@options_of(RuleSettings)
@options_of(MeterSettings)
@click.option(
    "--api-key-env",
    multiple=True,
    help="Variable with the key of a URL; given twice, of A and of B. Default: PENSTOCK_API_KEY.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the run. Default: a new one in PENSTOCK_RUNS or ./penstock-runs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    a: str,
    b: str,
    tasks: str | None,
    prompts: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    api_key_env: tuple[str, ...],
    **options: Any,
) -> int:
    """Is the variant B better than the base A?

    An arm is a URL (http://HOST:PORT#MODEL), or what is started for it: MODEL?option=value,
    vllm:MODEL, llama-server:FILE, transformers:MODEL, inprocess:MODEL. Or A and B are two finished
    runs of `penstock eval`, whose answers are paired. Every item is asked three times: of A, of B,
    and of A again; --limit makes it short.

    \b
    Exit status: 0 better or not worse; 1 an error; 2 wrong usage; 3 cannot tell,
    or the run is not valid; 4 worse; 130 stopped.
    """
    from penstock.measure.verdict.words import text

    interrupted = False
    with runs.usage():
        rules = build(RuleSettings, options)
        rules.rule()
        runs.check_output(output)
        are_runs = _are_runs(a, b)
        if are_runs:
            _check_options_of_runs()
    if are_runs:
        from penstock.measure.results import store
        from penstock.measure.verdict.runs import compare_runs

        path, made = compare_runs(store.find(a), store.find(b), rules, output, options["seed"])
    else:
        with runs.usage():
            measurement = _measurement(a, b, tasks, prompts, rules, output, api_key_env, options)
        made, interrupted = runs.measured(measurement, measurement.run(_progress()))
        assert measurement.path is not None
        path = measurement.path
    if sys.stderr.isatty():
        click.echo(err=True)  # the line of progress ends
    verdict = made.figures["overall"]["verdict"]
    status = runs.tell(
        path,
        made,
        lambda: text(made.figures),
        as_json=as_json,
        bad=verdict == "worse",
        interrupted=interrupted,
    )
    return runs.NOT_VALID if verdict == "cannot tell" else status


def _are_runs(a: str, b: str) -> bool:
    from penstock.measure.run import runs_dir

    places = [(Path(one), runs_dir() / one) for one in (a, b)]
    are = [any((place / HEADER).is_file() for place in some) for some in places]
    if are[0] != are[1]:
        run, other = (a, b) if are[0] else (b, a)
        raise ConfigError(
            f"`{run}` is a finished run, and `{other}` is none.",
            hint="compare two finished runs of `penstock eval`, or two arms that are asked now",
        )
    return all(are)


def _check_options_of_runs() -> None:
    context = click.get_current_context()
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in OF_RUNS and source == ParameterSource.COMMANDLINE:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` is for arms that are asked; two runs have been.",
                hint="of two runs, all tasks that both have are compared, by the rule's options",
            )


def _measurement(
    a: str,
    b: str,
    tasks: str | None,
    prompts: tuple[str, ...],
    rules: RuleSettings,
    output: Path | None,
    api_key_env: tuple[str, ...],
    options: dict[str, Any],
) -> Measurement:
    """What is asked for, read and checked."""
    from penstock.measure.engines.arms import parse_arms
    from penstock.measure.environment import hash_file
    from penstock.measure.load.endpoint import api_key
    from penstock.measure.quality import suites
    from penstock.measure.verdict.run import Measurement

    if len(api_key_env) > 2:
        raise ConfigError(
            f"`--api-key-env` is given `{len(api_key_env)}` times; there are two arms."
        )
    keys = [api_key(name) for name in api_key_env or (None,)]
    base, variant = parse_arms([a, b])
    meters = build(MeterSettings, options)
    load = build(LoadSettings, options)
    load.check()
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if harness := suites.of_harness(names):
        raise ConfigError(
            f"`--tasks` names `lm:{harness[0]}`, which cannot be asked in turns.",
            hint="run `penstock eval` on each arm, then `penstock compare RUN_A RUN_B`",
        )
    return Measurement(
        (base, variant),
        suites.find_all([*names, *prompts], tables_dir(meters)),
        load=load,
        rules=rules,
        meters=meters,
        directory=output,
        api_keys=(keys[0], keys[-1]),
        hashes={path: hash_file(Path(path)) for path in prompts},
    )


def _progress() -> Callable[[str], None]:
    """One line that changes on a terminal, else lines."""
    on_terminal = sys.stderr.isatty()

    def tell(line: str) -> None:
        click.echo(f"\r\x1b[K{line}" if on_terminal else line, err=True, nl=not on_terminal)

    return tell

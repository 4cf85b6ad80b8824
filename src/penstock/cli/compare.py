"""`penstock compare`: is B better than A, not worse, worse, or can that not be told?

Exit status: 0 better or not worse, 1 worse (or an error, which says so), 2 wrong usage, 3 cannot
be told or the run is not valid; with `--strict` the last is 1 too.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from penstock.cli.options import build, options_of
from penstock.errors import ConfigError
from penstock.measure.meters.settings import MeterSettings, tables_dir
from penstock.measure.run import FIGURES, HEADER, PAGE, Figures
from penstock.measure.verdict.settings import LoadSettings, RuleSettings

CANNOT_TELL = 3
PLAIN_LINES_S = 10.0  # between two lines of progress where stderr is no terminal
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
@click.option("--api-key-env", help="Variable with the key of a URL. Default: PENSTOCK_API_KEY.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the run. Default: a new one in PENSTOCK_RUNS or ./penstock-runs.",
)
@click.option("--strict", is_flag=True, help="Exit status 1, not 3, where it cannot be told.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    a: str,
    b: str,
    tasks: str | None,
    prompts: tuple[str, ...],
    output: Path | None,
    strict: bool,
    as_json: bool,
    api_key_env: str | None,
    **options: Any,
) -> int:
    """Is the variant B better than the base A?

    An arm is a URL (http://HOST:PORT#MODEL), or what is started for it: MODEL?option=value,
    vllm:MODEL, llama-server:FILE, transformers:MODEL, inprocess:MODEL. Or A and B are two finished
    runs of `penstock eval`, whose answers are paired.

    \b
    Exit status: 0 better or not worse; 1 worse; 3 cannot be told, or the run is not valid.
    """
    rules = build(RuleSettings, options)
    if _is_run(a) and _is_run(b):
        path, found = _finished(a, b, rules, output, tasks, prompts)
    else:
        path, found = _measured(a, b, tasks, prompts, rules, output, api_key_env, options)
    if as_json:
        click.echo(json.dumps({"run": str(path), "problems": found.problems} | found.figures))
    else:
        _print(path, found)
    return status(found, strict=strict)


def status(found: Figures, *, strict: bool) -> int:
    """The exit status of a comparison."""
    verdict = found.figures["overall"]["verdict"]
    if verdict == "worse":
        return 1
    if verdict == "cannot tell" or found.problems:
        return 1 if strict else CANNOT_TELL
    return 0


def _is_run(text: str) -> bool:
    from penstock.measure.run import runs_dir

    return (Path(text) / HEADER).is_file() or (runs_dir() / text / HEADER).is_file()


def _finished(
    a: str,
    b: str,
    rules: RuleSettings,
    output: Path | None,
    tasks: str | None,
    prompts: tuple[str, ...],
) -> tuple[Path, Figures]:
    from penstock.measure.results import store
    from penstock.measure.verdict.runs import compare_runs

    if tasks or prompts:
        raise ConfigError(
            "`--tasks` and `--prompts` are for arms; two runs have theirs.",
            hint="all tasks that both runs have are compared",
        )
    return compare_runs(store.find(a), store.find(b), rules, output)


def _measured(
    a: str,
    b: str,
    tasks: str | None,
    prompts: tuple[str, ...],
    rules: RuleSettings,
    output: Path | None,
    api_key_env: str | None,
    options: dict[str, Any],
) -> tuple[Path, Figures]:
    from penstock.measure.engines.arms import parse_arms
    from penstock.measure.environment import hash_file
    from penstock.measure.load.endpoint import api_key
    from penstock.measure.quality import suites
    from penstock.measure.verdict.run import run

    base, variant = parse_arms([a, b])
    meters = build(MeterSettings, options)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if harness := suites.of_harness(names):
        raise ConfigError(
            f"`--tasks` names `lm:{harness[0]}`, which cannot be asked in turns.",
            hint="run `penstock eval` on each arm, then `penstock compare RUN_A RUN_B`",
        )
    return run(
        (base, variant),
        suites.find_all([*names, *prompts], tables_dir(meters)),
        load=build(LoadSettings, options),
        rules=rules,
        meters=meters,
        directory=output,
        api_key=api_key(api_key_env),
        hashes={path: hash_file(Path(path)) for path in prompts},
        progress=_progress(),
    )


def _progress() -> Callable[[str], None]:
    """One line that changes on a terminal, else a line now and then."""
    on_terminal = sys.stderr.isatty()
    told_s = -math.inf

    def tell(line: str) -> None:
        nonlocal told_s
        if on_terminal:
            click.echo(f"\r\x1b[K{line}", err=True, nl=False)
        elif time.monotonic() - told_s >= PLAIN_LINES_S:
            told_s = time.monotonic()
            click.echo(line, err=True)

    return tell


def _print(path: Path, found: Figures) -> None:
    if sys.stderr.isatty():
        click.echo(err=True)  # the line of progress ends
    click.echo(found.figures["overall"]["sentence"])
    for problem in found.problems:
        click.echo(f"not valid: {problem}")
    click.echo(f"figures: {path / FIGURES}")
    click.echo(f"page:    {path / PAGE}")

"""`penstock eval`: score the answers of a model, a server or several of them.

Without torch and engine where the targets are URLs. Progress goes to stderr.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from penstock.cli import runs
from penstock.cli.options import build, options_of
from penstock.errors import PenstockError
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.quality.judge import JudgeSettings
from penstock.measure.quality.suites import KNOWN

if TYPE_CHECKING:
    from tqdm import tqdm

    from penstock.measure.quality.options import Options
    from penstock.measure.records import Request
    from penstock.measure.run import Figures

NOT_HERE = frozenset(field.name for field in fields(MeterSettings)) - {"prices", "tables"}


@click.command(
    epilog="Example: penstock eval http://127.0.0.1:8000 --tasks brook,my.jsonl,lm:arc_easy"
)
@click.argument("targets", nargs=-1, metavar="TARGET...")
@click.option("--tasks", default="brook", show_default=True, help="Names by commas: --list-tasks.")
@click.option("--list-tasks", is_flag=True, help="Print what `--tasks` takes, and end.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Directory of published data sets. Default: PENSTOCK_DATA.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="Items of each task, drawn by the seed; of `lm:` tasks the first ones.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ask each item so often: the noise of sampling.",
)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), help="Default: the task's, mostly 0.")
@click.option("--grader", help="For lines of your own tasks that name none: a kind, or JSON.")
@click.option("--max-tokens", type=click.IntRange(1), help="For lines that name none.")
@click.option("--system", help="System message for lines that name none.")
@click.option("--chat", is_flag=True, help="`lm:` tasks through the chat template.")
@click.option(
    "--num-fewshot", type=click.IntRange(0), help="Of gsm8k and `lm:`. Default: the task's."
)
@click.option(
    "--judge",
    metavar="TARGET",
    help="A model that judges the answers: two or more targets in pairs, one by a rubric.",
)
@click.option(
    "--votes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL of people's votes (`prompt`, `a`, `b`, `vote`) to calibrate the judge.",
)
@options_of(JudgeSettings)
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the run. Default: a new one below PENSTOCK_RUNS.",
)
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="Variable with the key of a URL. Default: PENSTOCK_API_KEY, else OPENAI_API_KEY.",
)
@click.option("--judge-api-key-env", metavar="NAME", help="The same for the judge.")
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Seconds that an engine may take to start, and an answer to come.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@options_of(MeterSettings, skip=NOT_HERE)
def command(targets: tuple[str, ...], list_tasks: bool, as_json: bool, **values: Any) -> int:
    """Score answers: published tasks, brook's, or your own.

    A TARGET is `http://HOST:PORT[#MODEL]`, `RECIPE:MODEL?option=value` (an engine that is started
    for it, such as `penstock:brook?quantization=int8`) or `inprocess:MODEL`.

    \b
    Exit status: 0 fine; 1 an error; 2 wrong usage; 3 the scores are not valid; 130 stopped by
    Ctrl-C or SIGTERM, with the figures of what was there.
    """  # fmt: skip
    if list_tasks:
        width = max(map(len, KNOWN))
        click.echo("\n".join(f"{name:<{width}}  {line}" for name, line in KNOWN.items()))
        return 0
    if not targets:
        raise click.UsageError("Missing argument 'TARGET...'.")
    if values["votes"] and not values["judge"]:
        raise click.UsageError("`--votes` calibrates a judge: name it by `--judge`.")
    from penstock.measure.kinds import finish
    from penstock.measure.quality.session import Session

    runs.check_output(values["output"])
    with runs.usage():
        session = Session(_options(targets, values))
    progress = _Progress()
    try:
        made, interrupted = runs.measured(session, session.run(progress))
    except PenstockError:
        if session.path is not None:  # what was asked before it keeps its figures
            _tell(session.path, finish(session.path), as_json=as_json)
        raise
    finally:
        progress.end()
    assert session.path is not None
    return _tell(session.path, made, as_json=as_json, interrupted=interrupted)


def _tell(path: Path, made: Figures, *, as_json: bool, interrupted: bool = False) -> int:
    from penstock.measure.quality.page import text_table

    return runs.tell(
        path, made, lambda: text_table(made.figures), as_json=as_json, interrupted=interrupted
    )


def _options(targets: tuple[str, ...], values: dict[str, Any]) -> Options:
    from penstock.measure.quality.options import Options

    context = click.get_current_context()
    own = {name: values[name] for name in ("grader", "max_tokens", "system")}
    same = ("data", "limit", "seed", "repeats", "concurrency", "temperature", "chat",
            "num_fewshot", "judge", "votes", "api_key_env", "judge_api_key_env")  # fmt: skip
    return Options(
        targets=targets,
        tasks=[name.strip() for name in values["tasks"].split(",") if name.strip()],
        own={name: value for name, value in own.items() if value is not None},
        judge_settings=build(JudgeSettings, values),
        out=values["output"],
        timeout_s=values["timeout"],
        meters=build(MeterSettings, values),
        named=frozenset(
            name
            for name in values
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ),
        **{name: values[name] for name in same},
    )


class _Progress:
    """One bar for each part; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._num_errors = 0

    def begin(self, what: str, total: int) -> None:
        from tqdm import tqdm

        self.end()
        self._num_errors = 0
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit="row", dynamic_ncols=True)
        else:
            click.echo(f"{what}: {total} rows", err=True)

    def row(self, row: Request) -> None:
        self._num_errors += row.error_class is not None
        if self._bar is not None:
            if row.error_class is not None:
                self._bar.set_postfix(errors=self._num_errors)
            self._bar.update()

    def say(self, line: str) -> None:
        self.end()
        click.echo(line, err=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

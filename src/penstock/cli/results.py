"""`penstock results`: the runs that were kept, and how other tools' files become runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from penstock.cli import runs
from penstock.measure.kinds import KINDS

if TYPE_CHECKING:
    from penstock.measure.results.diff import Diff, Row
    from penstock.measure.results.store import Entry, Sort

FORMATS = ("guidellm", "aiperf", "vllm-bench", "lm-eval", "llmperf")


@click.group(
    invoke_without_command=True,
    epilog="Example: penstock results --kind bench --model llama --since 7d",
)
@click.option("--kind", type=click.Choice(list(KINDS)), help="Only runs of this kind.")
@click.option("--model", help="A part of a model's name.")
@click.option("--engine", help="A part of an engine's name.")
@click.option("--since", help="A date such as 2026-11-22, or an age such as 12h or 7d.")
@click.option("--valid/--not-valid", default=None, help="Only runs that are, or are not, valid.")
@click.option("--text", help="A part of the id, the command, a name or a problem.")
@click.option(
    "--sort",
    type=click.Choice(["started", "kind", "model", "engine", "records"]),
    default="started",
    show_default=True,
    help="Newest first, by name, or most records first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(
    ctx: click.Context,
    kind: str | None,
    model: str | None,
    engine: str | None,
    since: str | None,
    valid: bool | None,
    text: str | None,
    sort: Sort,
    as_json: bool,
) -> None:
    """List the runs that were kept; the commands below take one by its path or its id.

    Runs are kept in PENSTOCK_RUNS, else in `penstock-runs` of the current directory. A run that
    was written elsewhere with --output is not listed; name it by its path.
    """
    if ctx.invoked_subcommand is not None:
        return
    import msgspec

    from penstock.measure.results import store
    from penstock.measure.run import runs_dir

    with runs.usage():  # of the filters
        found = store.select(
            store.entries(),
            kind=kind,
            model=model,
            engine=engine,
            since=since,
            valid=valid,
            text=text,
            sort=sort,
        )
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found)))
    elif not found:
        click.echo(f"no runs in {runs_dir()} that fit", err=True)
    else:
        _echo_list(found)


@command.command(epilog="Example: penstock results show 20261122T1923")
@click.argument("run")
@click.option("--all", "everything", is_flag=True, help="Print every figure.")
@click.option("--json", "as_json", is_flag=True, help="Print header and figures as JSON.")
def show(run: str, everything: bool, as_json: bool) -> int:
    """Print a run's figures as the command that made it did.

    RUN is a run's directory, its id, or a part of the id that no other in PENSTOCK_RUNS has.

    Exit status: 3 if the run was not finished, or is not valid.
    """
    import msgspec

    from penstock.cli import results_text
    from penstock.measure.results import show as showing
    from penstock.measure.results import store
    from penstock.measure.run import Run

    opened = Run(store.find(run))
    figures = opened.figures()
    if as_json:
        plain = {"header": opened.header, "figures": figures}
        click.echo(json.dumps(msgspec.to_builtins(plain)))
        return 0 if figures and not figures.problems else runs.NOT_VALID
    click.echo(f"{opened.header.run_id} ({opened.header.kind}, {opened.header.started_at})")
    for arm in opened.header.arms:
        click.echo("  " + ", ".join(filter(None, (arm.name, arm.model, arm.engine, arm.precision))))
    if figures is None:
        click.echo(f"not finished: penstock verify --finish {opened.path}", err=True)
        return runs.NOT_VALID
    if everything:
        width = shutil.get_terminal_size((120, 24)).columns
        told = "\n".join(showing.lines(figures.figures, width=width))
    else:
        told = results_text.text(opened.header.kind, figures.figures)
    return runs.tell(opened.path, figures, lambda: told, as_json=False)


@command.command(epilog="Example: penstock results diff 20261120T1 20261122T1 --match ttft")
@click.argument("a")
@click.argument("b")
@click.option("--match", help="Of all figures, those with this in their path that differ.")
@click.option("--all", "everything", is_flag=True, help="Every figure, also those that are equal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff(a: str, b: str, match: str | None, everything: bool, as_json: bool) -> None:
    """Lay the headline figures of two runs of a kind side by side, and tell what else differs.

    A and B are runs' directories, ids, or parts of ids.
    """
    import msgspec

    from penstock.measure.results import diff as diffing
    from penstock.measure.results import store
    from penstock.measure.run import Run

    found = diffing.diff(Run(store.find(a)), Run(store.find(b)))
    if match is None and not everything:
        found.rows = found.headline
    found.rows = [
        row
        for row in found.rows
        if match is None or (match in row.path and (everything or row.a != row.b))
    ]
    if as_json:
        plain = {"comparable": found.comparable, **msgspec.to_builtins(found)}
        click.echo(json.dumps(plain))
    else:
        _echo_diff(found)


@command.command(epilog="Example: penstock results export 20261122T1923 --format csv -o rows.csv")
@click.argument("run")
@click.option(
    "--format", "form", type=click.Choice(["csv", "parquet", "json"]), help="Default: by the name."
)
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="Default: stdout.")
def export(run: str, form: Literal["csv", "parquet", "json"] | None, output: str | None) -> None:
    """Write one row a request: raw fields and derived figures.

    RUN is a run's directory, its id, or a part of the id that no other in PENSTOCK_RUNS has.
    """
    from penstock.measure.results import export as exporting
    from penstock.measure.results import store
    from penstock.measure.run import Run

    to = None if output in (None, "-") else Path(str(output))
    if form is None:
        suffix = to.suffix[1:] if to else ""
        form = suffix if suffix in ("parquet", "json") else "csv"  # type: ignore[assignment]
    assert form is not None
    text = exporting.export(Run(store.find(run)), form, to)
    if text is not None:
        click.echo(text, nl=False)


@command.command(
    "import", epilog="Example: penstock results import results_2026.json samples_gsm8k_2026.jsonl"
)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), help="Default: as the file looks.")
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), help="The run's directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(files: tuple[Path, ...], form: str | None, output: Path | None, as_json: bool) -> int:
    """Make a run of files of GuideLLM, AIPerf, vLLM's bench, lm-eval or LLMPerf.

    Files that belong together (figures and rows of one measurement) are given together.
    """
    from penstock.cli.results_text import text
    from penstock.measure.results.importing import import_files
    from penstock.measure.run import Run

    path = import_files(files, form=form, directory=output)
    made = Run(path).figures()
    assert made is not None
    for note in made.figures["notes"]:
        click.echo(note, err=True)
    return runs.tell(path, made, lambda: text("import", made.figures), as_json=as_json)


def _echo_list(found: list[Entry]) -> None:
    from penstock.measure.results.show import cell, grid

    rows = [["run", "kind", "target", "model", "requests", "state", "key figure"]]
    for entry in found:
        told = "; ".join(filter(None, (entry.key_figure, *entry.problems)))
        rows.append(
            [
                cell(entry.run_id),
                cell(entry.kind or None),
                cell(", ".join(entry.targets) or None, limit=32),
                cell(", ".join(entry.models) or None, limit=24),
                cell(entry.num_requests),
                entry.state,
                cell(told, limit=80),
            ]
        )
    for line in grid(rows, right=[False] * 4 + [True]):
        click.echo(line)


def _echo_diff(found: Diff) -> None:
    from penstock.measure.results.show import grid

    click.echo(f"a: {found.a}\nb: {found.b}")
    if found.rows:
        rows = [["figure", "a", "b", "b / a"]]
        rows += [
            [row.path, _value(row.a, row), _value(row.b, row), _ratio(row)] for row in found.rows
        ]
        for line in grid(rows, right=[False, True, True, True]):
            click.echo(line)
    if not any(row.a != row.b for row in found.rows):
        click.echo("no figure differs")
    if found.arms:
        _echo_rows("what was measured differs:", found.arms)
    for title, differing in (
        ("settings", found.settings),
        ("hashes", found.hashes),
        ("environment", found.environment),
    ):
        if differing:
            _echo_rows(f"{title} differ; the figures may not be comparable:", differing)
    for problem in found.problems:
        click.echo(f"NOT VALID: {problem}")


def _echo_rows(title: str, rows: list[Row]) -> None:
    from penstock.measure.results.show import cell

    click.echo(title)
    for row in rows:
        click.echo(f"  {row.path}: {cell(row.a)} | {cell(row.b)}")


def _value(value: Any, row: Row) -> str:
    from penstock.measure.report.units import quantity
    from penstock.measure.results.show import cell

    if row.unit and isinstance(value, int | float):
        return quantity(value, row.unit)
    return cell(value, _named(row.path))


def _named(path: str) -> str:
    """The name in a path that says the unit: `ttft_s` of `groups[a].ttft_s.p99`."""
    parts = path.split(".")
    return (
        ""
        if parts[-1] == "n"
        else next((part for part in reversed(parts) if "_" in part), parts[-1])
    )


def _ratio(row: Any) -> str:
    from penstock.measure.results.show import cell

    return "" if row.ratio is None else cell(float(row.ratio))

"""The kinds of runs, and who makes their figures and their page of the raw records.

A kind is a module with `figures(header, records) -> (figures, problems)` and one with
`page(header, figures, records) -> html`; both are pure. `finish` ends a run, `verify` repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from penstock.errors import ConfigError
from penstock.measure.records import Header, Record
from penstock.measure.run import FIGURES, PAGE, Figures, Run


class Kind(NamedTuple):
    """Names of modules."""

    figures: str
    page: str


KINDS = {
    "bench": Kind("penstock.measure.load.figures", "penstock.measure.load.page"),
    "engines": Kind("penstock.measure.engines.figures", "penstock.measure.engines.page"),
    "eval": Kind("penstock.measure.quality.figures", "penstock.measure.quality.page"),
    "compare": Kind("penstock.measure.verdict.figures", "penstock.measure.verdict.page"),
    "track": Kind("penstock.measure.track.figures", "penstock.measure.track.page"),
    "import": Kind("penstock.measure.results.imported", "penstock.measure.results.imported"),
}


def _kind(header: Header) -> Kind:
    if header.kind not in KINDS:
        raise ConfigError(
            f"Run `{header.run_id}` is of the kind `{header.kind}`, which this version does not "
            "know.",
            hint=f"known: {', '.join(KINDS)}",
        )
    return KINDS[header.kind]


def compute(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """The figures of raw records, as JSON has them, and why they are not valid."""
    module = import_module(_kind(header).figures)
    figures, problems = module.figures(header, records)
    return msgspec.json.decode(msgspec.json.encode(figures)), list(problems)


def finish(path: Path) -> Figures:
    """Compute the figures of a run's directory, and write them and the page.

    Raises:
        ConfigError: it is no run, is damaged, or cannot be written.
    """
    run = Run(path)
    figures, problems = compute(run.header, run.records)
    made = Figures(
        kind=run.header.kind,
        header_sha256=run.header_sha256,
        records_sha256=run.records_sha256,
        num_records=len(run.records),
        problems=problems,
        figures=figures,
    )
    try:
        (path / FIGURES).write_bytes(msgspec.json.format(msgspec.json.encode(made)) + b"\n")
        page = import_module(_kind(run.header).page).page(run.header, figures, run.records)
        (path / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be written: {error.strerror}.") from None
    return made

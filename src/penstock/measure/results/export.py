"""A run's requests as a table: one row a request, raw fields and derived figures side by side.

Writes CSV, Parquet and JSON. Derived columns are those of `metrics.OF_REQUEST`; lists and mappings
are JSON in CSV. Knows no kind of run.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import IO, Any, Final, Literal

import msgspec

from penstock.errors import ConfigError
from penstock.measure.metrics import OF_REQUEST
from penstock.measure.records import Request
from penstock.measure.run import Run

Format = Literal["csv", "parquet", "json"]
_WHOLE: Final = tuple(field.name for field in msgspec.structs.fields(Request))


def rows(run: Run) -> list[dict[str, Any]]:
    """Plain rows, all with the same columns in the same order; absent is None.

    Scores become columns `score.<name>`; the run's id and start come first.
    """
    requests = run.requests
    scores = list(dict.fromkeys(name for row in requests for name in row.scores))
    return [
        {
            "run_id": run.header.run_id,
            "started_at": run.header.started_at,
            **{name: getattr(row, name) for name in _WHOLE if name != "scores"},
            "ok": row.ok,
            **{name: compute(row) for name, compute in OF_REQUEST.items()},
            **{f"score.{name}": row.scores.get(name) for name in scores},
        }
        for row in requests
    ]


def export(run: Run, form: Format, to: Path | None) -> str | None:
    """Write the rows of a run.

    Args:
        to: a file; None returns the text instead, which Parquet is not.

    Raises:
        ConfigError: the file cannot be written, or Parquet has no file.
    """
    if form == "parquet" and to is None:
        raise ConfigError("Parquet is no text and needs a file.", hint="--output FILE")
    try:
        if form == "parquet":
            assert to is not None
            _parquet(rows(run), to)
            return None
        text = _csv(rows(run)) if form == "csv" else _json(rows(run))
        if to is None:
            return text
        to.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"`{to}` cannot be written: {error.strerror}.") from None
    return None


def _json(table: list[dict[str, Any]]) -> str:
    return json.dumps(table, ensure_ascii=False) + "\n"


def _csv(table: list[dict[str, Any]]) -> str:
    told = io.StringIO()
    _write_csv(table, told)
    return told.getvalue()


def _write_csv(table: list[dict[str, Any]], to: IO[str]) -> None:
    columns = list(table[0]) if table else ["run_id", "started_at", *_WHOLE]
    # RFC 4180's ends of lines: with others, Python leaves a carriage return in a text unquoted.
    writer = csv.DictWriter(to, columns, lineterminator="\r\n")
    writer.writeheader()
    for row in table:
        writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    """A value in CSV. A text that a spreadsheet would take for a formula gets an apostrophe."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False) if value else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def _parquet(table: list[dict[str, Any]], to: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    scores = [name for name in (table[0] if table else {}) if name.startswith("score.")]
    schema = pyarrow.schema(
        [
            *[(name, pyarrow.string()) for name in ("run_id", "started_at")],
            *[(name, _type(name)) for name in _WHOLE if name != "scores"],
            ("ok", pyarrow.bool_()),
            *[(name, pyarrow.float64()) for name in OF_REQUEST],
            *[(name, pyarrow.float64()) for name in scores],
        ]
    )
    for row in table:
        row["details"] = json.dumps(row["details"], ensure_ascii=False)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema=schema), to)


def _type(name: str) -> Any:
    """The Arrow type of a field of `Request`."""
    import pyarrow

    if name.startswith("chunk_"):
        return pyarrow.list_(pyarrow.int64())
    annotation = str(Request.__annotations__[name])
    if annotation.startswith("int"):
        return pyarrow.int64()
    if annotation.startswith("float"):
        return pyarrow.float64()
    return pyarrow.string()

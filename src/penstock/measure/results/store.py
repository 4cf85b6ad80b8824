"""The runs of a directory: found by id, listed and filtered. Reads headers and figures only.

A run that is damaged is listed as such, so that it can be found and thrown away.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from penstock.errors import ConfigError
from penstock.measure.records import Header
from penstock.measure.run import FIGURES, HEADER, Figures, runs_dir

Sort = Literal["started", "kind", "model", "engine", "records"]
_AGES_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Entry(msgspec.Struct, kw_only=True):
    """A run in a list."""

    run_id: str
    path: str
    kind: str = ""
    started_at: str = ""
    models: list[str] = []
    engines: list[str] = []
    precisions: list[str] = []
    num_records: int | None = None  # None: it was not finished
    valid: bool | None = None  # None: it was not finished, or is damaged
    problems: list[str] = []
    command: str = ""


def find(text: str) -> Path:
    """The directory of a run that a user named by a path, its id, or a part of the id.

    Raises:
        ConfigError: none, or more than one.
    """
    path = Path(text)
    if (path / HEADER).is_file():
        return path
    if path.is_file() and (path.parent / HEADER).is_file():  # a file of a run, such as its page
        return path.parent
    root = runs_dir()
    ids = sorted(entry.name for entry in _directories(root))
    for matches in (
        [name for name in ids if name == text],
        [name for name in ids if name.startswith(text)],
        [name for name in ids if text in name],
    ):
        if len(matches) == 1:
            return root / matches[0]
        if matches:
            some = ", ".join(matches[:5]) + (" and others" if len(matches) > 5 else "")
            raise ConfigError(f"`{text}` may be one of {len(matches)} runs.", hint=some)
    raise ConfigError(
        f"There is no run `{text}`, neither as a directory nor in `{root}`.",
        hint="`penstock results` lists runs; PENSTOCK_RUNS names their directory",
    )


def entries(root: Path | None = None) -> list[Entry]:
    """All runs of a directory, newest first."""
    found = [_entry(path) for path in _directories(root or runs_dir())]
    return sorted(found, key=lambda entry: (entry.started_at, entry.run_id), reverse=True)


def select(
    found: Iterable[Entry],
    *,
    kind: str | None = None,
    model: str | None = None,
    engine: str | None = None,
    since: str | None = None,
    valid: bool | None = None,
    text: str | None = None,
    sort: Sort = "started",
) -> list[Entry]:
    """Runs that fit all that is given; parts of names are enough, capitals do not matter.

    Args:
        since: a date such as `2026-11-22`, or an age such as `12h` or `7d`.
        valid: False also selects runs that were not finished.
        text: a part of the id, the command, a model or a problem.

    Raises:
        ConfigError: `since` is neither.
    """
    begin = None if since is None else _moment(since)

    def fits(entry: Entry) -> bool:
        everything = [entry.run_id, entry.command, *entry.models, *entry.engines, *entry.problems]
        return (
            (kind is None or entry.kind == kind)
            and (model is None or _any(model, entry.models))
            and (engine is None or _any(engine, entry.engines))
            and (begin is None or entry.started_at >= begin)
            and (valid is None or (entry.valid is True) == valid)
            and (text is None or _any(text, everything))
        )

    chosen = [entry for entry in found if fits(entry)]
    if sort == "kind":
        chosen.sort(key=lambda entry: entry.kind)
    elif sort == "model":
        chosen.sort(key=lambda entry: [name.lower() for name in entry.models])
    elif sort == "engine":
        chosen.sort(key=lambda entry: [name.lower() for name in entry.engines])
    elif sort == "records":
        chosen.sort(key=lambda entry: -(entry.num_records or 0))
    return chosen


def _any(part: str, names: Iterable[str]) -> bool:
    return any(part.lower() in name.lower() for name in names)


def _moment(since: str) -> str:
    """As headers write moments, so that text compares."""
    if match := re.fullmatch(r"(\d+)([mhdw])", since):
        begin = time.gmtime(time.time() - int(match[1]) * _AGES_S[match[2]])
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", begin)
    if re.fullmatch(r"\d{4}(-\d{2}){0,2}(T[\d:]*Z?)?", since):
        return since
    raise ConfigError(
        f"`--since {since}` is neither a date nor an age.", hint="such as 2026-11-22, 12h or 7d"
    )


def _directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if (path / HEADER).is_file()]


def _entry(path: Path) -> Entry:
    try:
        header = msgspec.json.decode((path / HEADER).read_bytes(), type=Header)
    except (OSError, msgspec.MsgspecError) as error:
        return Entry(run_id=path.name, path=str(path), problems=[f"{HEADER} is damaged: {error}"])
    entry = Entry(
        run_id=header.run_id,
        path=str(path),
        kind=header.kind,
        started_at=header.started_at,
        models=_distinct(arm.model or arm.target for arm in header.arms),
        engines=_distinct(f"{arm.engine} {arm.engine_version}".strip() for arm in header.arms),
        precisions=_distinct(arm.precision for arm in header.arms),
        command=" ".join(header.command),
    )
    try:
        figures = msgspec.json.decode((path / FIGURES).read_bytes(), type=Figures)
    except FileNotFoundError:
        entry.problems = ["not finished"]
    except (OSError, msgspec.MsgspecError) as error:
        entry.problems = [f"{FIGURES} is damaged: {error}"]
    else:
        entry.num_records, entry.problems = figures.num_records, figures.problems
        entry.valid = not figures.problems
    return entry


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))

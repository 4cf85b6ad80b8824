"""The runs of a directory: found by id, listed and filtered. Decodes headers and figures only.

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
from penstock.measure.results.headline import key_figure
from penstock.measure.run import DAMAGE, FIGURES, HEADER, RECORDS, Figures, runs_dir

State = Literal["valid", "not valid", "unfinished", "damaged"]
Sort = Literal["started", "kind", "model", "engine", "records"]
_REQUEST = b'{"type":"request"'
_AGES_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Entry(msgspec.Struct, kw_only=True):
    """A run in a list."""

    run_id: str
    path: str
    kind: str = ""
    started_at: str = ""
    state: State = "unfinished"
    targets: list[str] = []  # what was measured, as the user wrote it
    models: list[str] = []
    engines: list[str] = []
    precisions: list[str] = []
    num_requests: int | None = None  # None: the records cannot be read
    num_records: int | None = None  # None: it was not finished
    key_figure: str = ""
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
    if path.is_dir():
        raise ConfigError(
            f"`{text}` has no `{HEADER}`: it is no run.", hint="`penstock results` lists runs"
        )
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
    except (OSError, *DAMAGE) as error:
        problem = f"{HEADER} is damaged: {error}"
        return Entry(run_id=path.name, path=str(path), state="damaged", problems=[problem])
    entry = Entry(
        run_id=header.run_id,
        path=str(path),
        kind=header.kind,
        started_at=header.started_at,
        num_requests=_num_requests(path / RECORDS),
        targets=_distinct(arm.name or arm.target for arm in header.arms),
        models=_distinct(arm.model or arm.target for arm in header.arms),
        engines=_distinct(f"{arm.engine} {arm.engine_version}".strip() for arm in header.arms),
        precisions=_distinct(arm.precision for arm in header.arms),
        command=" ".join(header.command),
    )
    try:
        figures = msgspec.json.decode((path / FIGURES).read_bytes(), type=Figures)
        entry.key_figure = key_figure(header.kind, figures.figures)
    except FileNotFoundError:
        entry.problems = ["not finished"]
    except (OSError, ConfigError, *DAMAGE) as error:
        told = error.message if isinstance(error, ConfigError) else str(error)
        entry.state, entry.problems = "damaged", [f"{FIGURES} is damaged: {told}"]
    else:
        entry.num_records, entry.problems = figures.num_records, figures.problems
        entry.valid = not figures.problems
        entry.state = "valid" if entry.valid else "not valid"
    if entry.num_requests is None:
        entry.state, entry.valid = "damaged", None
        entry.problems = [*entry.problems, f"{RECORDS} cannot be read"]
    return entry


def _num_requests(path: Path) -> int | None:
    """How many lines are requests, by how they begin: a list need not decode them all."""
    try:
        with path.open("rb") as file:
            return sum(line.startswith(_REQUEST) for line in file)
    except FileNotFoundError:
        return 0
    except OSError:
        return None


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))

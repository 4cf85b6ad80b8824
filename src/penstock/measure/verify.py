"""Whether a run's figures are what its raw records say, and whether its files are as they were.

Repeats what `kinds.finish` did and compares value by value; knows no figure. A difference is one
where the JSON differs at all: figures are pure functions of the header and the records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock import __version__
from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.environment import hash_directory, hash_file
from penstock.measure.run import FIGURES, HEADER, PAGE, RECORDS, Figures, Run

FileState = Literal["unchanged", "changed", "not here"]
PageState = Literal["equal", "differs", "not here"]
_HASHES = ("records_sha256", "header_sha256")  # of `Figures`: compared with the files themselves


class Mismatch(msgspec.Struct, kw_only=True):
    """A value of `figures.json` that comes out differently."""

    path: str  # such as `figures.arms.a.ttft_s.p99`
    stored: Any
    recomputed: Any
    only_in: Literal["", "stored", "recomputed"] = ""  # the other has no such value


class Verification(msgspec.Struct, kw_only=True):
    """What was found. `ok`: every figure follows from the records, and these are the same."""

    run_id: str
    kind: str
    path: str
    finished: bool
    num_records: int
    records_unchanged: bool | None = None  # None: the run was not finished, nobody knows
    header_unchanged: bool | None = None
    num_values: int = 0  # compared
    mismatches: list[Mismatch] = []
    problems: list[str] = []  # why the run is not valid, which it may be and yet be verified
    page: PageState = "not here"
    files: dict[str, FileState] = {}  # of the header's hashes, by what they are of
    version: str = ""  # of penstock that measured
    version_here: str = __version__
    notes: list[str] = []

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts the run; a file that changed since does not."""
        page = self.page != "differs" or self.version != self.version_here
        same = bool(self.records_unchanged and self.header_unchanged)
        return self.finished and same and not self.mismatches and page


def verify(path: Path, *, finish: bool = False) -> Verification:
    """Compute a run's figures again from its raw records, and compare.

    Args:
        path: the run's directory.
        finish: compute figures and page first where a run came to no end.

    Raises:
        ConfigError: it is no run, a file of it is damaged, or its records give no figures.
    """
    run = Run(path)
    stored = run.figures()
    notes = [*_cut_off(path)]
    if stored is None and finish:
        stored = _finish(path)
        notes.append("The figures were computed now: the run had not come to its end.")
    found = Verification(
        run_id=run.header.run_id,
        kind=run.header.kind,
        path=str(path),
        finished=stored is not None,
        num_records=len(run.records),
        version=run.header.version,
        files=_files(run),
        notes=notes,
    )
    if stored is None:
        found.notes.append(
            "Figures were not yet made: the run was stopped. What it recorded can be read."
        )
        return found
    found.records_unchanged = stored.records_sha256 == run.records_sha256
    found.header_unchanged = _header_unchanged(path, stored)
    found.problems = stored.problems
    _recompute(found, run)
    return found


def _finish(path: Path) -> Figures:
    try:
        return kinds.finish(path)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever records that were cut short lead to
        raise ConfigError(
            f"No figures follow from the records of `{path}` ({type(error).__name__}: {error})."
        ) from None


def _recompute(found: Verification, run: Run) -> None:
    """Compare the figures and the page with what the records give, if they still give anything."""
    told = msgspec.json.decode((run.path / FIGURES).read_bytes())
    told = {name: value for name, value in told.items() if name not in _HASHES}
    found.num_values = sum(1 for _ in _leaves(told))
    try:
        figures, problems = kinds.compute(run.header, run.records)
        expected = {
            "kind": run.header.kind,
            "num_records": len(run.records),
            "problems": problems,
            "figures": figures,
        }
        found.mismatches = list(compare(told, expected))
        found.page = _page(run, figures)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever records that were changed lead to
        why = f"not computed: {type(error).__name__}: {error}"
        found.mismatches = [Mismatch(path="figures", stored=told["figures"], recomputed=why)]


def compare(stored: Any, recomputed: Any, path: str = "") -> Iterator[Mismatch]:
    """Where two JSON values differ: a number of another type (1 and 1.0) differs too."""
    if isinstance(stored, dict) and isinstance(recomputed, dict):
        for name in [*stored, *(name for name in recomputed if name not in stored)]:
            inner = f"{path}.{name}" if path else str(name)
            if name in stored and name in recomputed:
                yield from compare(stored[name], recomputed[name], inner)
            else:
                yield _lone(inner, stored.get(name), recomputed.get(name), name in stored)
    elif isinstance(stored, list) and isinstance(recomputed, list):
        common = min(len(stored), len(recomputed))
        for index in range(common):
            yield from compare(stored[index], recomputed[index], f"{path}[{index}]")
        for index, value in enumerate(stored[common:], start=common):
            yield _lone(f"{path}[{index}]", value, None, True)
        for index, value in enumerate(recomputed[common:], start=common):
            yield _lone(f"{path}[{index}]", None, value, False)
    elif repr(stored) != repr(recomputed):  # 1 and 1.0, 0.0 and -0.0 are not the same
        yield Mismatch(path=path, stored=stored, recomputed=recomputed)


def _lone(path: str, stored: Any, recomputed: Any, is_stored: bool) -> Mismatch:
    side: Literal["stored", "recomputed"] = "stored" if is_stored else "recomputed"
    return Mismatch(path=path, stored=stored, recomputed=recomputed, only_in=side)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _cut_off(path: Path) -> Iterator[str]:
    """A last line without its end is what a killed process leaves."""
    try:
        with (path / RECORDS).open("rb") as file:
            if file.seek(0, 2) == 0:
                return
            file.seek(-1, 2)
            whole = file.read(1) == b"\n"
    except FileNotFoundError:
        yield f"There is no `{RECORDS}`: nothing was recorded, or it was taken away."
        return
    if not whole:
        yield f"The last line of `{RECORDS}` is cut off; it is not counted."


def _header_unchanged(path: Path, stored: Figures) -> bool:
    """Whether the header is the one that was there at the end."""
    return hashlib.sha256((path / HEADER).read_bytes()).hexdigest() == stored.header_sha256


def _page(run: Run, figures: dict[str, Any]) -> PageState:
    try:
        stored = (run.path / PAGE).read_bytes()
    except FileNotFoundError:
        return "not here"
    except OSError as error:
        raise ConfigError(f"`{run.path / PAGE}` cannot be read: {error.strerror}.") from None
    made = import_module(kinds.KINDS[run.header.kind].page).page(run.header, figures, run.records)
    return "equal" if made.encode() == stored else "differs"


def _files(run: Run) -> dict[str, FileState]:
    """State of what the header has hashes of, where its path is known and leads somewhere.

    A hash is kept under the path of its file, or under a name that `settings.files` has a path for.
    """
    paths = run.header.settings.get("files")
    paths = paths if isinstance(paths, dict) else {}
    found: dict[str, FileState] = {}
    for name, kept in run.header.hashes.items():
        path = Path(str(paths.get(name, name)))
        try:
            if not path.exists():
                found[name] = "not here"
                continue
            now = hash_directory(path) if path.is_dir() else hash_file(path)
        except (ConfigError, OSError, ValueError):
            found[name] = "not here"
            continue
        found[name] = "unchanged" if now == kept else "changed"
    return found

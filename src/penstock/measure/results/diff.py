"""Two runs of a kind side by side: figures with their ratio, and what else differs.

Says nothing about what a difference means: one run each way is no comparison (`penstock compare`
repeats and interleaves). Knows no figure.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from penstock.errors import ConfigError
from penstock.measure.records import Header
from penstock.measure.results.flat import flat
from penstock.measure.results.headline import headline
from penstock.measure.run import Figures, Run

# Of an environment: what changes from minute to minute, and says nothing on its own.
_RESTLESS: Final = re.compile(
    r"load\.|available_bytes|used_bytes|frequency|_clock_mhz|temperature|utilization|num_processes"
)
_NOT_MEASURED: Final = ("name", "target")


class Row(msgspec.Struct, kw_only=True):
    """A figure in both runs; None: that run does not have it."""

    path: str
    a: Any
    b: Any
    ratio: float | None = None  # b / a
    unit: str = ""  # of both values, where it is known; else the path's last name says it


class Diff(msgspec.Struct, kw_only=True):
    """Two runs. Where anything but `arms` differs, figures may not be comparable.

    Arms that have other names in the second run are called as in the first, by their place.
    """

    kind: str
    a: str
    b: str
    headline: list[Row]  # the first figures of the kind, those that are equal too
    rows: list[Row]  # every figure
    problems: list[str]  # a run that is not valid
    arms: list[Row]  # what was measured
    settings: list[Row]
    hashes: list[Row]
    environment: list[Row]

    @property
    def comparable(self) -> bool:
        """Whether both are valid, and of the same settings, data and machine."""
        return not (self.problems or self.settings or self.hashes or self.environment)


def diff(a: Run, b: Run) -> Diff:
    """Lay two runs side by side.

    Raises:
        ConfigError: they are of different kinds, or one was not finished.
    """
    if a.header.kind != b.header.kind:
        raise ConfigError(
            f"`{a.header.run_id}` is of the kind `{a.header.kind}` and `{b.header.run_id}` of the "
            f"kind `{b.header.kind}`: their figures are not the same."
        )
    stored = [_figures(run) for run in (a, b)]
    ours = stored[0].figures
    theirs = _renamed(stored[1].figures, _names(a.header, b.header))
    problems = [
        f"{run.header.run_id}: {problem}"
        for run, figures in zip((a, b), stored, strict=True)
        for problem in figures.problems
    ]
    return Diff(
        kind=a.header.kind,
        a=a.header.run_id,
        b=b.header.run_id,
        headline=_headline(a.header.kind, ours, theirs),
        rows=_rows(ours, theirs),
        problems=problems,
        arms=_differing(_arms(a.header), _arms(b.header)),
        settings=_differing(a.header.settings, b.header.settings),
        hashes=_differing(a.header.hashes, b.header.hashes),
        environment=[
            row
            for row in _differing(a.header.environment, b.header.environment)
            if not _RESTLESS.search(row.path)
        ],
    )


def _headline(kind: str, a: dict[str, Any], b: dict[str, Any]) -> list[Row]:
    """The figures that the kind is about, by their titles."""
    ours, theirs = ({one.title: one for one in headline(kind, figures)} for figures in (a, b))
    rows = []
    for title in [*ours, *(title for title in theirs if title not in ours)]:
        left, right = ours.get(title), theirs.get(title)
        values = [None if one is None else one.value for one in (left, right)]
        if values != [None, None]:
            unit = (left or right or theirs[title]).unit
            rows.append(Row(path=title, a=values[0], b=values[1], ratio=_ratio(*values), unit=unit))
    return rows


def _figures(run: Run) -> Figures:
    figures = run.figures()
    if figures is None:
        raise ConfigError(
            f"`{run.header.run_id}` was not finished and has no figures.",
            hint=f"penstock verify --finish {run.path}",
        )
    return figures


def _names(a: Header, b: Header) -> dict[str, str]:
    """What the arms of `b` are called in `a`: by place, where no name is in both."""
    ours, theirs = ([arm.name for arm in header.arms] for header in (a, b))
    if len(ours) != len(theirs) or set(ours) & set(theirs):
        return {}
    return dict(zip(theirs, ours, strict=True))


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Figures with other names of arms: as keys, and as the value of `arm`."""
    if isinstance(value, dict):
        return {
            names.get(key, key): names.get(inner, inner)
            if key == "arm" and isinstance(inner, str)
            else _renamed(inner, names)
            for key, inner in value.items()
        }
    return [_renamed(inner, names) for inner in value] if isinstance(value, list) else value


def _rows(a: dict[str, Any], b: dict[str, Any]) -> list[Row]:
    ours, theirs = flat(a), flat(b)
    paths = [*ours, *(path for path in theirs if path not in ours)]
    return [
        Row(
            path=path,
            a=ours.get(path),
            b=theirs.get(path),
            ratio=_ratio(ours.get(path), theirs.get(path)),
        )
        for path in paths
    ]


def _differing(a: Any, b: Any) -> list[Row]:
    return [row for row in _rows(a, b) if row.a != row.b]


def _ratio(a: Any, b: Any) -> float | None:
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b)
    )
    return b / a if numbers and a else None


def _arms(header: Header) -> dict[str, Any]:
    """By place: what the first arm of one run is called is the first arm of the other."""
    plain: list[dict[str, Any]] = msgspec.to_builtins(header.arms)
    return {
        str(index): {name: value for name, value in arm.items() if name not in _NOT_MEASURED}
        for index, arm in enumerate(plain)
    }

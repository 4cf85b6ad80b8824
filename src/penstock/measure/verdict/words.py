"""A verdict in words: one sentence, and a table for a terminal.

Pure, of axes and of figures as JSON has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.measure.verdict import rule
from penstock.measure.verdict.rule import Axis


def sentence(
    verdict: str, because: Sequence[str], axes: Mapping[str, Axis], arms: Sequence[str]
) -> str:
    """The verdict for somebody who reads one line."""
    base, variant = arms
    parts = [told for name in rule.AXES if name in axes and (told := tell(axes[name]))]
    which = " and ".join(because)
    # Axes that are not guarded: what a reader of the first words alone must not miss.
    dearer = [axis.name for axis in axes.values() if axis.verdict == "worse"]
    but = f", but worse in {' and '.join(dearer)}" if dearer else ""
    begin = {
        "better": f"`{variant}` is better than `{base}` ({which})",
        "not worse": f"`{variant}` is not worse than `{base}` ({which}){but}",
        "worse": f"`{variant}` is worse than `{base}` ({which})",
        "cannot tell": f"It cannot be told whether `{variant}` is worse than `{base}`"
        + (f" ({which})" if which else ""),
    }[verdict]
    return f"{begin}: {'; '.join(parts)}." if parts else f"{begin}."


def tell(axis: Axis) -> str:
    """One axis in a few words."""
    if axis.estimate is None:
        told = f"{axis.name}: {axis.verdict} ({axis.note})"
        return f"{told}: {missing(axis)}" if missing(axis) else told
    told = f"{axis.name} {effect(axis)}"
    if axis.note:
        told += f" [{axis.note}]"
    if ends := between(axis):
        told += f" ({ends})"
    told += f": {axis.verdict}"
    return f"{told}: {missing(axis)}" if missing(axis) else told


def missing(axis: Axis) -> str:
    """What to do where it cannot tell."""
    if axis.verdict != "cannot tell":
        return ""
    if axis.num_more is not None:
        return f"needs about {about(axis.num_more)} more {axis.unit}"
    return "more of the same would not help" if axis.estimate is not None else ""  # note says why


def about(number: int) -> str:
    """A number that is a guess, in two digits: 31,000 for 30,911."""
    if number < 100:
        return f"{number}"
    step: int = 10 ** (len(str(number)) - 2)
    return f"{round(number / step) * step:,}"


def effect(axis: Axis) -> str:
    """The estimate with its unit; nothing where there is none."""
    if axis.estimate is None:
        return ""
    told = f"{axis.estimate:+.1f} points" if axis.kind == "difference" else f"×{axis.estimate:.3g}"
    return told.replace("-", "−")


def between(axis: Axis) -> str:
    """The interval; nothing where there is none."""
    if axis.low is None or axis.high is None:
        return ""
    shape = "{:+.1f} to {:+.1f}" if axis.kind == "difference" else "{:.3g} to {:.3g}"
    return shape.format(axis.low, axis.high).replace("-", "−")


def text(figures: Mapping[str, Any]) -> str:
    """What a terminal shows: the sentence, the axes, and what to know of them."""
    axes = [msgspec.convert(one, Axis) for one in figures["axes"].values()]
    rows = [("axis", "verdict", "effect", "interval", "")]
    for axis in axes:
        note = "; ".join(one for one in (missing(axis), axis.note) if one)
        rows.append((axis.name, axis.verdict, effect(axis), between(axis), note))
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    lines = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows if axes]
    notes = [f"note: {note}" for note in figures["notes"]]
    return "\n".join([figures["overall"]["sentence"], "", *lines, *notes])

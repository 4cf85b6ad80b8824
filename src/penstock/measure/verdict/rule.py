"""From intervals to verdicts: what `better`, `not worse`, `worse` and `cannot tell` mean.

Works on effects where more is better: a difference of scores, or the logarithm of a ratio. Every
axis is judged alone by `judge`, all together by `overall`; `words` says the rule as it was applied.
Pure; arrays are judged element by element, so that a power is that of this very rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike

Verdict = Literal["better", "not worse", "worse", "cannot tell"]
VERDICTS: tuple[Verdict, ...] = ("cannot tell", "worse", "not worse", "better")
AXES = ("quality", "speed", "memory", "energy", "cost")
MEMORY_SPREAD = 10.0  # per cent by which peaks of two starts of one thing may differ


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`settings["rule"]` of a run: what was decided before the first request was sent."""

    max_drop: float = 1.0  # points of quality (100 is all right) that may be lost
    tolerance: float = 2.0  # per cent by which speed, energy, cost may be worse
    min_speedup: float | None = None  # else the overall verdict is not `better`
    guard: tuple[str, ...] = ("quality", "speed")  # axes that may not be worse
    alpha: float = 0.05
    num_looks: int = 1  # how often the data may be looked at
    success_at: float = 0.5  # a score from which on an answer is a success

    @property
    def memory_tolerance(self) -> float:
        """Per cent; one start of each arm shows no spread, so it is assumed."""
        return max(self.tolerance, MEMORY_SPREAD)

    def split(self, num_axes: int) -> float:
        """Level of a claim `better` or `worse`: of one axis, at one look (Bonferroni)."""
        return self.alpha / max(num_axes, 1) / self.num_looks

    @property
    def alpha_not_worse(self) -> float:
        """One-sided level of a claim `not worse` at one look.

        Not divided by the axes: overall it needs every guarded axis (intersection-union test).
        """
        return self.alpha / self.num_looks


def judge(
    estimate: ArrayLike,
    is_significant: ArrayLike,
    bound: ArrayLike,
    margin: float,
    floor: ArrayLike = 0.0,
) -> Any:
    """Indices into VERDICTS.

    Args:
        estimate: of the effect; more is better.
        is_significant: whether it differs from 0 at the level of a claim.
        bound: one-sided lower bound of the effect.
        margin: loss that is tolerated, at least 0.
        floor: effect that the same arm shows against itself; nothing below it is believed.
    """
    estimate, floor = np.asarray(estimate, float), np.asarray(floor, float)
    claims = np.asarray(is_significant, bool) & (np.abs(estimate) > floor)
    within = (np.asarray(bound, float) > -margin) & (floor <= margin)
    worse = claims & (estimate < 0) & ~within
    better = claims & (estimate > 0)
    return np.select([better, worse, within], [3, 1, 2], 0)


class Axis(msgspec.Struct, kw_only=True):
    """One axis of the verdict. Effects are as `judge` has them; the others are for people."""

    name: str
    verdict: Verdict
    metric: str
    kind: Literal["difference", "ratio"]
    estimate: float | None = None  # B - A in points, or B/A
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    bound: float | None = None  # one-sided, on the side of a loss; same scale
    bound_confidence: float | None = None
    margin: float = 0.0  # points, or per cent
    p: float | None = None
    floor: float | None = None  # points, or per cent
    method: str = ""
    num_more: int | None = None  # units that are missing, where it cannot tell
    unit: str = ""  # of num_more: `items`, `blocks`
    note: str = ""


def overall(axes: Mapping[str, Axis], rule: Rule) -> tuple[Verdict, list[str]]:
    """The verdict on all axes, and the names of those that made it."""
    guarded = [axes[name] for name in rule.guard if name in axes]
    for verdict in ("worse", "cannot tell"):
        names = [axis.name for axis in guarded if axis.verdict == verdict]
        if names:
            return verdict, names
    if not guarded:
        return "cannot tell", []
    gains = [axis.name for axis in axes.values() if axis.verdict == "better"]
    if any(axis.verdict == "worse" for axis in axes.values()):
        gains = []  # what is faster and dearer is a trade, which is not ours to make
    speed = axes.get("speed")
    if rule.min_speedup is not None:
        reached = (
            speed is not None and speed.verdict == "better" and (speed.low or 0) >= rule.min_speedup
        )
        gains = gains if reached else []
    return ("better", gains) if gains else ("not worse", [axis.name for axis in guarded])


def untold(name: str, note: str) -> Axis:
    """An axis that was asked for and could not be measured: it cannot be told."""
    kind: Literal["difference", "ratio"] = "difference" if name == "quality" else "ratio"
    return Axis(name=name, verdict="cannot tell", metric="not measured", kind=kind, note=note)


def words(rule: Rule, axes: Sequence[str], num_axes: int) -> list[str]:
    """The rule in sentences; `num_axes` of the axes are tested."""
    guard = [name for name in rule.guard if name in axes]
    level = 100 * (1 - rule.split(num_axes))
    lines = [
        f"An axis is `better` or `worse` if the {level:.4g} % interval of its effect leaves out "
        "`no difference` (for right and wrong answers: if the exact McNemar test rejects it at the "
        "same level) and the effect is larger than the noise floor, which the base shows against "
        "itself. "
        f"{100 * rule.alpha:g} % is divided by {num_axes} tested axes"
        + (f" and {rule.num_looks} planned looks (Bonferroni)" if rule.num_looks > 1 else "")
        + ": so often may any such claim be false, all of them together.",
        f"It is `not worse` if a loss of {rule.max_drop:g} points of quality, or of "
        f"{rule.tolerance:g} % of the others, is excluded by the one-sided "
        f"{100 * (1 - rule.alpha_not_worse):.4g} % bound and the noise floor is below that margin; "
        "a loss that is certain but certainly within the margin is `not worse` too.",
        "Anything else is `cannot tell`, with the number of items or blocks that are missing.",
        f"Overall: `worse` if one of {', '.join(guard) or 'no axis'} is worse, `cannot tell` if "
        "one of them cannot be told (or was asked for and could not be measured), `better` if no "
        "axis at all is worse and any is better, else `not worse`.",
    ]
    if "memory" in axes:
        lines.append(
            "Memory is one peak of one start of each arm, which has no spread: `better` or `worse` "
            f"only beyond {rule.memory_tolerance:g} %, which covers what two starts of the same "
            "arm differ by; else `not worse`."
        )
    if rule.min_speedup is not None:
        lines.append(
            f"`better` also needs a speed-up of {rule.min_speedup:g} at the lower end of its "
            "interval."
        )
    return lines

"""Memory, energy and cost of two arms. Pure functions of records and settings.

Energy and machine time are taken per leg, so that they are interleaved like speed. Cost is that of
a successful answer: what all answers cost, also the wrong ones and the errors, over those that were
right. A ratio is always one of sums, and its interval is made by leaving blocks out.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.measure.meters import prices
from penstock.measure.meters.energy import IDLE, Energy, energy
from penstock.measure.meters.figures import memory_figures
from penstock.measure.meters.series import phases
from penstock.measure.records import Header, Mark, Record, Request, Sample
from penstock.measure.verdict import statistics
from penstock.measure.verdict.rule import VERDICTS, Axis, Rule, judge
from penstock.measure.verdict.speed import Legs, Pairs, log_margin, too_few
from penstock.measure.verdict.statistics import FEWEST_BLOCKS, Interval

NUM_AROUND = 24  # samples before and after a window: more than one reading of all meters makes


class Peak(NamedTuple):
    """The most memory that an arm was seen to use under load; None: not its process, or no GPU.

    RSS, not PSS: what an arm shares with the other one must not depend on the other's being there.
    """

    host_bytes: float | None
    gpu_bytes: float | None
    high_water_bytes: float | None  # since the start of its processes, loading included

    @property
    def total_bytes(self) -> float | None:
        known = [value for value in (self.host_bytes, self.gpu_bytes) if value is not None]
        return sum(known) if known else None


def peak_memory(records: Sequence[Record], arm: str, end_ns: int | None = None) -> Peak:
    """Of the arm's tree of processes, over all samples until then."""
    found = memory_figures(records, arm, end_ns=end_ns)
    on_gpu = found["peak_gpu_bytes"] if found["gpu_bytes_of"] == "processes of the arm" else None
    host, high = found["peak_rss_bytes"], found["hwm_bytes"]
    return Peak(*(None if one is None else float(one) for one in (host, on_gpu, high)))


def memory_axis(
    base: Peak, variant: Peak, alike: tuple[Peak, Peak] | None, rule: Rule
) -> Axis | None:
    """By ratios of peaks alone: one start of each is no sample, and its spread is assumed.

    Args:
        base, variant: of the whole run.
        alike: until the base is asked what the variant is not (again, and against itself). Many
            servers grow with every request, so the whole run's peaks favour the variant; both must
            say the same.
    """
    pairs = [pair for pair in (alike, (base, variant)) if pair is not None]
    ratios = [_ratio_of(*pair) for pair in pairs]
    if None in ratios or not ratios:
        return None
    known = [ratio for ratio in ratios if ratio is not None]
    limit = log_margin(rule.memory_tolerance)
    found = [
        3 if math.log(ratio) < -limit else (1 if math.log(ratio) > limit else 2) for ratio in known
    ]
    is_clear = len(set(found)) == 1
    return Axis(
        name="memory",
        verdict=VERDICTS[found[0] if is_clear else 0],
        metric="peak of the arm's processes"
        + (" (RSS)" if base.gpu_bytes is None else " (RSS and GPU)")
        + (", while both were asked the same" if alike is not None else ""),
        kind="ratio",
        estimate=known[0],
        margin=rule.memory_tolerance,
        method="one peak each",
        note="one start of each"
        if is_clear
        else "one start of each; of the whole run, in which the base is asked more, it is "
        f"×{known[-1]:.3g}",
    )


def _ratio_of(base: Peak, variant: Peak) -> float | None:
    if not base.total_bytes or not variant.total_bytes:
        return None
    if (base.gpu_bytes is None) != (variant.gpu_bytes is None):
        return None
    return variant.total_bytes / base.total_bytes


class Window(NamedTuple):
    """One leg in time."""

    begin_ns: int
    end_ns: int

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.begin_ns) * 1e-9


def window(rows: Sequence[Request]) -> Window | None:
    """From the first sending to the last end."""
    begins = [row.t_sent_ns for row in rows if row.t_sent_ns is not None]
    ends = [row.t_done_ns for row in rows if row.t_done_ns is not None]
    return Window(min(begins), max(ends)) if begins and ends else None


class EnergyOf:
    """The energy of windows, by one source for a whole run.

    Of a long run only the readings around a window are looked at, and those of the idle phase.
    """

    def __init__(self, header: Header, records: Sequence[Record]) -> None:
        self._settings = header.settings
        samples = [record for record in records if isinstance(record, Sample)]
        self._samples = sorted(samples, key=lambda sample: sample.t_ns)
        self._times = [sample.t_ns for sample in self._samples]
        idle = [one for one in phases(records) if one.name == IDLE][:1]
        self._idle: list[Record] = [
            record
            for record in records
            if isinstance(record, Mark) and record.name.startswith(f"{IDLE}.")
        ]
        for one in idle:
            self._idle += self._around(one.begin_ns, one.end_ns)
        self._known: dict[tuple[str, Window], Energy] = {}

    @property
    def example(self) -> Energy | None:
        """What was found of one window, if any was asked for."""
        return next(iter(self._known.values()), None)

    def __call__(self, arm: str, span: Window) -> Energy:
        key = (arm, span)
        if key not in self._known:
            records = [*self._idle, *self._around(span.begin_ns, span.end_ns)]
            self._known[key] = energy(records, arm, span.begin_ns, span.end_ns, self._settings)
        return self._known[key]

    def _around(self, begin_ns: int, end_ns: int) -> list[Sample]:
        first = max(bisect_left(self._times, begin_ns) - NUM_AROUND, 0)
        return self._samples[first : bisect_right(self._times, end_ns) + NUM_AROUND]


def joules_per_token(
    legs: Legs, arms: tuple[str, str], energy_of: EnergyOf
) -> tuple[Pairs, list[dict[str, Any]]]:
    """Of each block, and its parts for the table. Blocks without a figure are left out."""
    pairs, table = [], []
    for block, roles in legs.items():
        values = []
        for role, arm in enumerate(arms):
            spans = [window(rows) for rows in roles[role].values()]
            parts = [energy_of(arm, span) for span in spans if span is not None]
            num = sum(row.n_out or 0 for rows in roles[role].values() for row in rows if row.ok)
            known = [part.joules_gross for part in parts if part.joules_gross is not None]
            is_whole = num and len(known) == len(spans)
            values.append(math.fsum(known) / num if is_whole else None)
        if values[0] and values[1]:
            pairs.append((values[0], values[1]))
            table.append({"block": block, "a": values[0], "b": values[1]})
    return pairs, table


# --- per successful answer -----------------------------------------------------------------------


class Unit(NamedTuple):
    """One arm's share of a block: what it cost and what came of it."""

    usd: float | None
    joules: float | None
    num_success: float
    num_asked: int
    num_tokens: int


def is_success(row: Request, tasks: Mapping[str, Any], rule: Rule) -> bool:
    """A whole answer, and where it was graded a right one."""
    if not row.ok:
        return False
    facts = tasks.get(row.task)
    return facts is None or row.scores.get(str(facts["main_score"]), 0.0) >= rule.success_at


def units(
    rows: Iterable[Request],
    arms: tuple[str, str],
    header: Header,
    rule: Rule,
    energy_of: EnergyOf,
) -> list[tuple[Unit, Unit]]:
    """By block, both arms; rows are those of one stage."""
    found: dict[int, dict[int, dict[int, list[Request]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if row.phase == "steady" and row.error_class != "cut":
            slot = int(row.details.get("slot", 0))
            found[row.block][int(row.details["role"])][slot].append(row)
    return [
        (
            _unit(roles[0], arms[0], header, rule, energy_of),
            _unit(roles[1], arms[1], header, rule, energy_of),
        )
        for _, roles in sorted(found.items())
        if len(roles) == 2
    ]


def _unit(
    slots: Mapping[int, Sequence[Request]],
    arm: str,
    header: Header,
    rule: Rule,
    energy_of: EnergyOf,
) -> Unit:
    rows = [row for some in slots.values() for row in some]
    spans = [span for some in slots.values() if (span := window(some)) is not None]
    parts = [energy_of(arm, span).joules_gross for span in spans]
    known = [part for part in parts if part is not None]
    joules = math.fsum(known) if parts and len(known) == len(parts) else None
    if arm in header.prices or any(row.usd is not None for row in rows):
        each = [row.usd for row in rows]
        usd = None if None in each else math.fsum(value for value in each if value is not None)
    else:
        duration_s = math.fsum(span.duration_s for span in spans)
        usd = prices.machine_cost(header.settings, duration_s, joules).usd
    tasks = header.settings.get("tasks", {})
    return Unit(
        usd,
        joules,
        sum(is_success(row, tasks, rule) for row in rows),
        len(rows),
        sum(row.n_out or 0 for row in rows),
    )


def per_success(
    pairs: Sequence[tuple[Unit, Unit]], amount: Callable[[Unit], float | None]
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]] | None:
    """Amounts [blocks] of each arm, and successes [2, blocks]; None where an amount is missing."""
    arms = []
    for role in (0, 1):
        values = [amount(pair[role]) for pair in pairs]
        if not values or None in values:
            return None
        arms.append(np.array(values, float))
    successes = np.array([[pair[role].num_success for pair in pairs] for role in (0, 1)], float)
    if (successes.sum(axis=1) == 0).any() or any(arm.sum() <= 0 for arm in arms):
        return None
    return arms, successes


def success_ratio(
    pairs: Sequence[tuple[Unit, Unit]],
    amount: Callable[[Unit], float | None],
    confidence: float = 0.95,
) -> Interval | None:
    """Log of (variant's amount per success / base's), by leaving out blocks."""
    found = per_success(pairs, amount)
    if found is None or len(pairs) < 2:
        return None
    (base, variant), successes = found

    def log_ratio(blocks: NDArray[np.int64]) -> float:
        sums = [base[blocks].sum(), variant[blocks].sum(), *successes[:, blocks].sum(axis=1)]
        if min(sums) <= 0:
            return math.inf
        return float(np.log(sums[1] / sums[0] * sums[2] / sums[3]))

    return statistics.jackknife(log_ratio, len(pairs), confidence).of_enough()


def cost_axis(
    pairs: Sequence[tuple[Unit, Unit]], floor: float, rule: Rule, num_axes: int
) -> Axis | None:
    """The verdict on the cost of a successful answer; None where no cost is known.

    Args:
        floor: noise floor on the log scale, of whatever is paid for by time.
    """
    level = 1 - rule.split(num_axes)
    interval = success_ratio(pairs, lambda unit: unit.usd, level)
    if interval is None:
        return None
    metric, unit = "US dollars per successful answer", "blocks of answers"
    if len(pairs) < FEWEST_BLOCKS:
        return msgspec.structs.replace(too_few("cost", metric, len(pairs), rule), unit=unit)
    loss = success_ratio(pairs, lambda unit: unit.usd, 1 - 2 * rule.alpha_not_worse)
    assert loss is not None
    is_known = math.isfinite(interval.low) and math.isfinite(interval.high)
    verdict = VERDICTS[0]
    if is_known:
        significant = interval.low > 0 or interval.high < 0
        verdict = VERDICTS[
            int(
                judge(
                    -interval.estimate, significant, -loss.high, log_margin(rule.tolerance), floor
                )
            )
        ]
    return Axis(
        name="cost",
        verdict=verdict,
        metric=metric,
        kind="ratio",
        estimate=math.exp(interval.estimate),
        low=_exp(interval.low),
        high=_exp(interval.high),
        confidence=level,
        bound=_exp(loss.high),
        bound_confidence=1 - rule.alpha_not_worse,
        margin=rule.tolerance,
        floor=100 * math.expm1(floor) if floor else None,
        method="t, jackknife over blocks",
        num_more=_num_more(interval, len(pairs), rule, num_axes)
        if verdict == "cannot tell" and is_known
        else None,
        unit=unit,
        note="" if is_known else "a block holds all successes",
    )


def _num_more(interval: Interval, num: int, rule: Rule, num_axes: int) -> int | None:
    from penstock.measure.verdict import power

    half = (interval.high - interval.low) / 2
    sd = half / float(statistics.half_width(1.0, num, interval.confidence))
    wanted = [
        power.blocks_needed(sd, abs(interval.estimate), rule.split(num_axes) / 2),
        power.blocks_needed(
            sd, log_margin(rule.tolerance) - interval.estimate, rule.alpha_not_worse
        ),
    ]
    there = [one for one in wanted if one is not None]
    return max(1, min(there) - num) if there else None


def arm_sums(pairs: Sequence[tuple[Unit, Unit]], role: int) -> dict[str, Any]:
    """One arm over all blocks: sums, and amounts per success with Fieller's interval."""
    mine = [pair[role] for pair in pairs]
    successes: list[float] = [unit.num_success for unit in mine]
    made: dict[str, Any] = {
        "num_asked": sum(unit.num_asked for unit in mine),
        "num_success": sum(successes),
        "num_tokens": sum(unit.num_tokens for unit in mine),
    }
    for name in ("usd", "joules"):
        values: list[Any] = [getattr(unit, name) for unit in mine]
        is_known = bool(values) and None not in values
        made[name] = math.fsum(values) if is_known else None
        made[f"{name}_per_success"] = None
        if is_known and any(successes) and len(mine) >= FEWEST_BLOCKS:
            made[f"{name}_per_success"] = statistics.fieller(values, successes)
    return made


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

"""Speed by interleaved blocks: ratios of the variant to the base, and what the base shows alone.

Requests within a block depend on one another, so the block is the unit: one logarithm of a ratio
each. Rows say which half of the pair they belong to (`details["role"]`, 0 the base) and which leg
of the block (`details["slot"]`). Pure functions of rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from penstock.measure import metrics
from penstock.measure.records import Request
from penstock.measure.verdict import power, statistics
from penstock.measure.verdict.bootstrap import log_ratio, quantile_ratio
from penstock.measure.verdict.power import Blocks
from penstock.measure.verdict.rule import VERDICTS, Axis, Rule
from penstock.measure.verdict.statistics import FEWEST_BLOCKS

SPEED, NOISE = "speed", "noise"  # stages of rows
THROUGHPUT = "output_tokens_per_s"
QUANTILES = (0.5, 0.95, 0.99)
MOST_UNLIKE = 0.05  # share by which mean lengths of answers under load may differ
Legs = dict[int, dict[int, dict[int, list[Request]]]]  # by block, role, slot
Pairs = list[tuple[float, float]]  # of a block: base, variant


def legs_of(rows: Iterable[Request], stage: str, requests: int = 1) -> Legs:
    """The measured requests of a stage; blocks with a leg that was cut are left out.

    Args:
        requests: that a whole leg has.
    """
    found: Legs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row.stage == stage and row.phase == "steady" and row.error_class != "cut":
            found[row.block][int(row.details["role"])][int(row.details["slot"])].append(row)
    return {
        block: roles
        for block, roles in sorted(found.items())
        if len(roles) == 2
        and all(len(slots) == 2 for slots in roles.values())
        and all(len(leg) >= requests for slots in roles.values() for leg in slots.values())
    }


def output_tokens_per_s(slots: Mapping[int, Sequence[Request]]) -> float | None:
    """Tokens of all whole answers over the time from first sending to last end, leg by leg."""
    num_tokens, duration_ns = 0, 0
    for rows in slots.values():
        ends = [row.t_done_ns for row in rows if row.t_done_ns is not None]
        begins = [row.t_sent_ns for row in rows if row.t_sent_ns is not None]
        if not ends or not begins:
            return None
        duration_ns += max(ends) - min(begins)
        num_tokens += sum(row.n_out or 0 for row in rows if row.ok)
    return num_tokens / (duration_ns * metrics.NS) if num_tokens and duration_ns else None


def mean_of(name: str) -> Callable[[Mapping[int, Sequence[Request]]], float | None]:
    """A block's mean of a figure of single requests."""
    figure = metrics.OF_REQUEST[name]

    def mean(slots: Mapping[int, Sequence[Request]]) -> float | None:
        values = values_of(slots, figure)
        return math.fsum(values) / len(values) if values else None

    return mean


def values_of(
    slots: Mapping[int, Sequence[Request]], figure: Callable[[Request], float | None]
) -> list[float]:
    """A figure of every whole answer of a block."""
    values = (figure(row) for rows in slots.values() for row in rows if row.ok)
    return [value for value in values if value is not None]


def latencies(is_open_loop: bool) -> tuple[str, ...]:
    """Figures of single requests that are compared; in an open loop from the due time."""
    if is_open_loop:
        return "ttft_from_due_s", "tpot_s", "e2e_from_due_s"
    return "ttft_s", "tpot_s", "e2e_s"


def primary(is_open_loop: bool) -> str:
    """What the verdict on speed is made on: capacity in a closed loop, else what users wait."""
    return "e2e_from_due_s" if is_open_loop else THROUGHPUT


def unlike(legs: Legs, arms: tuple[str, str]) -> list[str]:
    """Why answers of both arms under load are not the same work: lengths, who counted the tokens.

    Both were asked for answers of one fixed length; not every server can do that.
    """
    found = []
    both = [
        [row for roles in legs.values() for rows in roles[role].values() for row in rows if row.ok]
        for role in (0, 1)
    ]
    if not all(both):
        return []
    lengths = [math.fsum(row.n_out or 0 for row in rows) / len(rows) for rows in both]
    if abs(lengths[1] - lengths[0]) > MOST_UNLIKE * max(lengths):
        found.append(
            f"answers under load are not of one length: {lengths[0]:.4g} tokens of `{arms[0]}` and "
            f"{lengths[1]:.4g} of `{arms[1]}` on average, so their times are of different work"
        )
    sources = [{row.count_source for row in rows} for rows in both]
    if sources[0] != sources[1]:
        told = [", ".join(sorted(one)) for one in sources]
        found.append(
            f"tokens were counted by `{told[0]}` in `{arms[0]}`, `{told[1]}` in `{arms[1]}`"
        )
    return found


def pairs_of(legs: Legs, name: str) -> Pairs:
    """Of each block the value of both halves, where both have one."""
    value = output_tokens_per_s if name == THROUGHPUT else mean_of(name)
    made = []
    for roles in legs.values():
        base, variant = value(roles[0]), value(roles[1])
        if base and variant:
            made.append((base, variant))
    return made


def effects(pairs: Pairs, *, more_is_better: bool) -> Any:
    """Log ratio of each block, so that more is better."""
    logs = np.log([variant / base for base, variant in pairs])
    return logs if more_is_better else -logs


def log_margin(tolerance: float) -> float:
    """A tolerance in per cent on the log scale."""
    return -math.log1p(-tolerance / 100)


def ratio_axis(
    name: str,
    metric: str,
    pairs: Pairs,
    noise: Pairs,
    rule: Rule,
    num_axes: int,
    *,
    more_is_better: bool,
) -> Axis:
    """The verdict on a ratio over blocks.

    Args:
        pairs: values of both arms, by block.
        noise: the same of the base against itself.
    """
    if len(pairs) < FEWEST_BLOCKS:
        return too_few(name, metric, len(pairs), rule)
    logs = effects(pairs, more_is_better=more_is_better)
    mean, sd = float(logs.mean()), float(logs.std(ddof=1))
    blocks = Blocks(len(pairs), len(noise))
    floor, noise_sd = _floor(noise, blocks)
    verdict = VERDICTS[int(power.judge_blocks(mean, sd, floor, len(pairs), rule, num_axes))]
    level = 1 - rule.split(num_axes)
    interval = statistics.mean_interval(logs, level)
    bound = mean - float(statistics.half_width(sd, len(pairs), 1 - 2 * rule.alpha_not_worse))
    ends = [interval.low, interval.high] if more_is_better else [-interval.high, -interval.low]
    sign = 1 if more_is_better else -1
    return Axis(
        name=name,
        verdict=verdict,
        metric=metric,
        kind="ratio",
        estimate=math.exp(sign * mean),
        low=_exp(ends[0]),
        high=_exp(ends[1]),
        confidence=level,
        bound=_exp(sign * bound),
        bound_confidence=1 - rule.alpha_not_worse,
        margin=rule.tolerance,
        p=p_of(mean, sd, len(pairs)),
        floor=100 * math.expm1(floor) if blocks.num_noise >= FEWEST_BLOCKS else None,
        method="t of log ratios of blocks",
        num_more=(
            _num_more(mean, sd, floor, noise_sd, blocks, rule, num_axes)
            if verdict == "cannot tell"
            else None
        ),
        unit="blocks",
        note=(
            "significant, but below the noise floor"
            if verdict == "cannot tell" and (interval.low > 0 or interval.high < 0)
            else ""
        ),
    )


def too_few(name: str, metric: str, num: int, rule: Rule) -> Axis:
    """An axis of so few blocks that its interval would say nothing."""
    return Axis(
        name=name,
        verdict="cannot tell",
        metric=metric,
        kind="ratio",
        margin=rule.tolerance,
        num_more=FEWEST_BLOCKS - num,
        unit="blocks",
        note=f"too few blocks to tell: {num} of at least {FEWEST_BLOCKS}",
    )


def _floor(noise: Pairs, blocks: Blocks) -> tuple[float, float]:
    """The noise floor on the log scale, and the spread of the base against itself."""
    if blocks.num_noise < FEWEST_BLOCKS:
        return 0.0, 0.0
    logs = effects(noise, more_is_better=True)  # either sign: a floor has none
    sd = float(logs.std(ddof=1))
    return float(power.noise_floor(logs.mean(), sd, blocks)), sd


def p_of(mean: float, sd: float, num: int) -> float:
    """Two-sided p of Student's test that the mean log ratio is 0."""
    if sd == 0:
        return 1.0 if mean == 0 else 0.0
    return float(statistics.t_p_value(mean / sd * math.sqrt(num), num - 1))


def _num_more(
    mean: float,
    sd: float,
    floor: float,
    noise_sd: float,
    blocks: Blocks,
    rule: Rule,
    num_axes: int,
) -> int | None:
    """Blocks that are missing for either claim, at the effect and spread seen so far.

    A noise floor that comes of spread falls with the number of blocks; a bias of the base against
    itself does not, and then no number is enough.
    """
    t = float(statistics.t_quantile(0.975, max(blocks.num_noise - 1, 1)))
    is_bias = floor > t * noise_sd / math.sqrt(blocks.num) + 1e-12

    def under(floor_needed: float) -> int | None:
        """Blocks from which on the floor is below this."""
        if floor < floor_needed:
            return 2
        if is_bias or floor_needed <= 0:
            return None
        return math.ceil((t * noise_sd / floor_needed) ** 2)

    plans = [
        (power.blocks_needed(sd, abs(mean), rule.split(num_axes) / 2), under(abs(mean))),
        (
            power.blocks_needed(sd, mean + log_margin(rule.tolerance), rule.alpha_not_worse),
            under(log_margin(rule.tolerance)),
        ),
    ]
    wanted = [max(one, two) for one, two in plans if one is not None and two is not None]
    return max(1, min(wanted) - blocks.num) if wanted else None


def _exp(value: float) -> float:
    """`math.exp` that goes to infinity: an interval of two blocks may be very wide."""
    return math.exp(value) if value < 700 else math.inf


def compared(legs: Legs, is_open_loop: bool, seed: int) -> list[dict[str, Any]]:
    """Every metric of speed: means of both arms, ratio with 95 % intervals, p adjusted (Holm)."""
    made = []
    for name in (THROUGHPUT, *latencies(is_open_loop)):
        pairs = pairs_of(legs, name)
        if len(pairs) < 2:
            continue
        base, variant = zip(*pairs, strict=True)
        logs = effects(pairs, more_is_better=True)
        row: dict[str, Any] = {
            "metric": name,
            "a": _mean(base),
            "b": _mean(variant),
            "ratio": statistics.mean_interval(logs).map(_exp).of_enough(),
            "bootstrap": log_ratio(base, variant, seed=seed).map(_exp).of_enough(),
            "cv_a": _cv(base),
            "cv_b": _cv(variant),
            "p": p_of(float(logs.mean()), float(logs.std(ddof=1)), len(pairs)),
        }
        made.append(row)
    for row, adjusted in zip(made, statistics.holm([row["p"] for row in made]), strict=True):
        row["p_holm"] = adjusted
    return made


def quantiles(legs: Legs, is_open_loop: bool, seed: int) -> list[dict[str, Any]]:
    """Quantiles of latencies over all requests, and their ratio where there are enough."""
    made = []
    for name in latencies(is_open_loop):
        figure = metrics.OF_REQUEST[name]
        arms = [[values_of(roles[role], figure) for roles in legs.values()] for role in (0, 1)]
        pooled = [[value for block in arm for value in block] for arm in arms]
        if not all(all(block for block in arm) for arm in arms) or not all(pooled):
            continue
        for q in QUANTILES:
            made.append(
                {
                    "metric": name,
                    "q": q,
                    "n": [len(arm) for arm in pooled],
                    "a": metrics.quantile(pooled[0], q),
                    "b": metrics.quantile(pooled[1], q),
                    "ratio": quantile_ratio(arms[0], arms[1], q, seed=seed),
                }
            )
    return made


def block_table(legs: Legs, is_open_loop: bool) -> list[dict[str, Any]]:
    """Every block: who went first, values of both arms, and the log of the ratio."""
    name = primary(is_open_loop)
    made = []
    for block, roles in legs.items():
        value = output_tokens_per_s if name == THROUGHPUT else mean_of(name)
        base, variant = value(roles[0]), value(roles[1])
        made.append(
            {
                "block": block,
                "first": "ab"[0 if 0 in roles[0] else 1],
                "a": base,
                "b": variant,
                "log_ratio": math.log(variant / base) if base and variant else None,
            }
        )
    return made


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _cv(values: Sequence[float]) -> float:
    """Coefficient of variation over blocks."""
    return float(np.std(values, ddof=1)) / _mean(values)

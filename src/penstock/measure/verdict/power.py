"""How likely a verdict is, and how much data one needs. Pure functions of numbers.

Powers are those of the rule in `rule`, not of a textbook's test: every table of answers that can
come out is judged by it, or many drawn blocks are. Sample sizes are the usual formulas, for
"needs about N more".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from penstock.measure.verdict import statistics
from penstock.measure.verdict.rule import VERDICTS, Rule, Verdict, judge
from penstock.measure.verdict.statistics import FEWEST_BLOCKS

POWER = 0.8  # that sample sizes aim at
MOST = 10_000_000  # beyond, a sample size is no plan
_TAIL = 9.0  # standard deviations of counts that are left out: less than 1e-15


def judge_pairs(
    num_lost: ArrayLike, num_won: ArrayLike, num_pairs: int, rule: Rule, num_axes: int
) -> Any:
    """Indices into VERDICTS of tables of right and wrong answers to the same items."""
    lost, won = np.broadcast_arrays(np.asarray(num_lost), np.asarray(num_won))
    bound, _ = statistics.tango_bounds(lost, won, num_pairs, 1 - 2 * rule.alpha_not_worse)
    significant = statistics.mcnemar(lost, won) <= rule.split(num_axes)
    return judge((won - lost) / num_pairs, significant, bound, rule.max_drop / 100)


def quality_power(
    num_pairs: int, share_lost: float, share_won: float, rule: Rule, num_axes: int
) -> dict[Verdict, float]:
    """Probability of each verdict on quality, exactly: over all tables that can come out.

    Args:
        share_lost, share_won: of the items, those that only the base, only the variant gets right.
    """
    from scipy.stats import binom

    def counts(share: float, trials: int) -> Any:
        centre, width = trials * share, _TAIL * math.sqrt(trials * share * (1 - share) + 1)
        return np.arange(
            max(0, math.floor(centre - width)), min(trials, math.ceil(centre + width)) + 1
        )

    lost = counts(share_lost, num_pairs)[:, None]
    won = counts(share_won, num_pairs)[None, :]
    remaining = share_won / (1 - share_lost) if share_lost < 1 else 0.0
    chance = binom.pmf(lost, num_pairs, share_lost) * binom.pmf(
        won, np.maximum(num_pairs - lost, 0), min(remaining, 1.0)
    )
    verdicts = judge_pairs(lost, won, num_pairs, rule, num_axes)
    return {name: float(chance[verdicts == index].sum()) for index, name in enumerate(VERDICTS)}


class Blocks(NamedTuple):
    """What a comparison of blocks knows of its noise: sizes and standard deviations of logs."""

    num: int
    num_noise: int  # blocks of the base against itself; fewer than FEWEST_BLOCKS show no floor


def noise_floor(mean: ArrayLike, sd: ArrayLike, blocks: Blocks) -> Any:
    """Effect on a log scale that the base shows against itself with as many blocks.

    The larger of what it did show (`mean`), and half the 95 % interval that its spread `sd` over
    the blocks of noise gives for `blocks.num` of them.
    """
    if blocks.num_noise < FEWEST_BLOCKS:
        return np.zeros_like(np.asarray(mean, float))
    t = float(statistics.t_quantile(0.975, blocks.num_noise - 1))
    return np.maximum(np.abs(mean), t * np.asarray(sd) / math.sqrt(blocks.num))


def judge_blocks(
    mean: ArrayLike, sd: ArrayLike, floor: ArrayLike, num_blocks: int, rule: Rule, num_axes: int
) -> Any:
    """Indices into VERDICTS of logs of ratios over blocks, by Student's interval of their mean."""
    mean = np.asarray(mean, float)
    claim = statistics.half_width(sd, num_blocks, 1 - rule.split(num_axes))
    loss = statistics.half_width(sd, num_blocks, 1 - 2 * rule.alpha_not_worse)
    margin = -math.log1p(-rule.tolerance / 100)
    return judge(mean, np.abs(mean) > claim, mean - loss, margin, floor)


def speed_power(
    effect: float,
    sd: float,
    blocks: Blocks,
    rule: Rule,
    num_axes: int,
    *,
    seed: int = 0,
    num_draws: int = 40_000,
) -> dict[Verdict, float]:
    """Probability of each verdict on speed at one look, over drawn blocks and noise blocks.

    Args:
        effect: log of the ratio; negative is slower.
        sd: standard deviation of a block's log ratio, with the base against itself as with the
            variant.
    """
    rng = np.random.default_rng(seed)

    def drawn(centre: float, num: int) -> tuple[Any, Any]:
        means = centre + rng.standard_normal(num_draws) * sd / math.sqrt(num)
        return means, sd * np.sqrt(rng.chisquare(num - 1, num_draws) / (num - 1))

    noise_means, noise_sds = (
        drawn(0.0, blocks.num_noise) if blocks.num_noise >= FEWEST_BLOCKS else (0.0, 0.0)
    )
    floor = noise_floor(noise_means, noise_sds, blocks)
    means, spreads = drawn(effect, blocks.num)
    verdicts = judge_blocks(means, spreads, floor, blocks.num, rule, num_axes)
    shares = np.bincount(verdicts, minlength=len(VERDICTS)) / num_draws
    return dict(zip(VERDICTS, shares.tolist(), strict=True))


def items_needed(discordant: float, delta: float, alpha: float, power: float = POWER) -> int | None:
    """Paired items that show a difference: N ≈ (z_α + z_β)² (p10 + p01) / δ².

    The usual approximation for McNemar's test (Miettinen 1968; Connor 1987 subtracts δ², which
    matters only for large effects).

    Args:
        discordant: p10 + p01, share of items that come out differently.
        delta: difference, or its distance from the margin.
        alpha: one-sided; halve a two-sided level.
    """
    z = statistics.normal_quantile(1 - alpha) + statistics.normal_quantile(power)
    return _whole((float(z) ** 2) * discordant / delta**2) if delta > 0 else None


def blocks_needed(sd: float, delta: float, alpha: float, power: float = POWER) -> int | None:
    """Blocks with which Student's test shows an effect: n = ((t_α + t_β) sd / δ)², solved for n.

    Args:
        sd: of a block's log ratio.
        delta: effect on the log scale, or its distance from the margin.
        alpha: one-sided; halve a two-sided level.
    """
    if delta <= 0:
        return None
    num = 2
    for _ in range(100):
        df = max(num - 1, 1)
        t = statistics.t_quantile(1 - alpha, df) + statistics.t_quantile(power, df)
        wanted = _whole((float(t) * sd / delta) ** 2)
        if wanted is None:
            return None
        # Few blocks have a large t: go halfway, so that it settles.
        wanted = max(wanted, 2)
        if abs(wanted - num) <= 1:
            return max(wanted, num)
        num = (wanted + num + 1) // 2
    return num


def _whole(value: float) -> int | None:
    return math.ceil(value) if value < MOST else None

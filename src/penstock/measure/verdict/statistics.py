"""Intervals and tests for samples, pairs and blocks. Pure functions of numbers.

Knows no request and no verdict. An `Interval` says how it was made; `confidence` is two-sided.
Units of resampling, such as clusters and blocks, are the caller's: what depends on one another
belongs into one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MOST_FLIPPED = 16  # clusters whose signs are flipped in every way


FEWEST_BLOCKS = 4  # of fewer, an interval or a noise floor is too wide to be read


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate and where the truth lies, with two-sided `confidence`."""

    estimate: float
    low: float
    high: float
    confidence: float
    num_units: int  # what was taken as independent
    method: str

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the quantity, such as `math.exp`."""
        return msgspec.structs.replace(
            self,
            estimate=function(self.estimate),
            low=function(self.low),
            high=function(self.high),
        )

    def of_enough(self) -> Interval:
        """Without ends, which are infinite, where it is of too few blocks to be read."""
        if self.num_units >= FEWEST_BLOCKS:
            return self
        return msgspec.structs.replace(self, low=-math.inf, high=math.inf)


def normal_quantile(p: ArrayLike) -> Any:
    """The standard normal quantile."""
    from scipy.special import ndtri

    return ndtri(np.asarray(p, float))


def t_quantile(p: ArrayLike, df: ArrayLike) -> Any:
    """Student's t quantile."""
    from scipy.special import stdtrit

    return stdtrit(np.asarray(df, float), np.asarray(p, float))


def t_p_value(t: ArrayLike, df: ArrayLike) -> Any:
    """Two-sided p of a t statistic."""
    from scipy.special import stdtr

    return 2 * stdtr(np.asarray(df, float), -np.abs(np.asarray(t, float)))


# --- one sample ----------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean, mean ± t·s/√n. At least two values."""
    sample = np.asarray(values, float)
    mean = float(sample.mean())
    half = half_width(float(sample.std(ddof=1)), len(sample), confidence)
    return Interval(
        estimate=mean,
        low=mean - half,
        high=mean + half,
        confidence=confidence,
        num_units=len(sample),
        method="t",
    )


def half_width(sd: ArrayLike, num_units: int, confidence: float) -> Any:
    """Of Student's interval of the mean of `num_units` values with standard deviation `sd`."""
    return t_quantile((1 + confidence) / 2, num_units - 1) * np.asarray(sd) / math.sqrt(num_units)


def clustered_error(values: ArrayLike, clusters: Sequence[Hashable]) -> tuple[float, int]:
    """Standard error of a mean whose values depend on one another within clusters; clusters.

    SE² = G/(G-1) · Σ_c (Σ_{i∈c} (x_i - x̄))² / n²: Liang and Zeger 1986 for the mean, as Miller
    2024 (arXiv 2411.00640) asks for evaluations, with the usual factor for few clusters.
    """
    sample = np.asarray(values, float)
    _, place = np.unique(_codes(clusters), return_inverse=True)
    sums = np.bincount(place, weights=sample - sample.mean())
    num_clusters = len(sums)
    if num_clusters < 2:
        return math.inf, num_clusters
    scale = num_clusters / (num_clusters - 1)
    return math.sqrt(scale * float(sums @ sums)) / len(sample), num_clusters


def clustered_interval(
    values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> Interval:
    """Mean ± t·SE with `clustered_error` and clusters - 1 degrees of freedom."""
    error, num_clusters = clustered_error(values, clusters)
    mean = float(np.mean(np.asarray(values, float)))
    half = error * float(t_quantile((1 + confidence) / 2, max(num_clusters - 1, 1)))
    return Interval(
        estimate=mean,
        low=mean - half,
        high=mean + half,
        confidence=confidence,
        num_units=num_clusters,
        method="t, clustered",
    )


def clustered_bound(
    values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> float:
    """One-sided lower bound of a mean by `clustered_error`, with one more cluster that lost.

    Where few clusters differ, a spread says little of a loss that is rare: one that gained of 100
    would exclude a loss of 0.4 points, though 3 of 100 may lose without one being seen. So a
    cluster is added which lost as much as any changed (as Agresti and Caffo 2000 add outcomes to a
    table); of many clusters it counts for nothing.
    """
    sample, codes = np.asarray(values, float), _codes(clusters)
    num_clusters = int(codes.max()) + 1
    most = float(np.abs(np.bincount(codes, weights=sample)).max())
    size = max(round(len(sample) / num_clusters), 1)
    sample = np.concatenate([sample, np.full(size, -most / size)])
    codes = np.concatenate([codes, np.full(size, num_clusters)])
    error, _ = clustered_error(sample, codes.tolist())
    return float(sample.mean()) - float(t_quantile(confidence, num_clusters)) * error


def sign_flip_p(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """Exact two-sided p that sums of clusters are as often negative as positive (Fisher 1935).

    The share of all ways to sign them whose total is as far from 0. With more than 2^16 ways it is
    0, no test at all: so many clusters have a spread to judge by.
    """
    sums = np.bincount(_codes(clusters), weights=np.asarray(values, float))
    sums = sums[np.abs(sums) > 1e-12]
    if len(sums) > MOST_FLIPPED:
        return 0.0
    totals = np.zeros(1)
    for size in np.abs(sums):
        totals = np.concatenate([totals + size, totals - size])
    return float(np.mean(np.abs(totals) >= abs(float(sums.sum())) - 1e-9))


def _codes(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(cluster, len(known)) for cluster in clusters], np.int64)


def wilson(num_successes: float, num_trials: int, confidence: float = 0.95) -> Interval:
    """The score interval of a proportion (Wilson 1927)."""
    z = float(normal_quantile((1 + confidence) / 2))
    share = num_successes / num_trials
    scale = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    half = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2)) / scale
    return Interval(
        estimate=share,
        low=max(centre - half, 0.0),
        high=min(centre + half, 1.0),
        confidence=confidence,
        num_units=num_trials,
        method="Wilson",
    )


def bound_of_none(num_trials: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a proportion of which none was seen: 1 - α^(1/n), about 3/n.

    The "rule of three" (Hanley and Lippman-Hand 1983) is its value for 95 %.
    """
    return float(1 - (1 - confidence) ** (1 / num_trials))


# --- pairs ---------------------------------------------------------------------------------------


def mcnemar(num_lost: ArrayLike, num_won: ArrayLike) -> Any:
    """Exact two-sided p that discordant pairs fall either way alike (McNemar 1947).

    The binomial test on the discordant pairs, twice the smaller tail and at most 1; arrays go
    element by element.
    """
    from scipy.special import bdtr

    lost, won = np.asarray(num_lost, np.int64), np.asarray(num_won, np.int64)
    total = lost + won
    tail = np.where(total > 0, bdtr(np.minimum(lost, won), np.maximum(total, 1), 0.5), 1.0)
    return np.minimum(2 * tail, 1.0)


def tango_bounds(
    num_lost: ArrayLike, num_won: ArrayLike, num_pairs: int, confidence: float
) -> tuple[Floats, Floats]:
    """Score interval of a difference of paired proportions, (won - lost) / pairs (Tango 1998).

    Unlike Wald's it does not collapse where no pair is discordant, and keeps its level in small
    samples; its one-sided bound is the score test of non-inferiority. Arrays go element by element.

    Returns:
        Lower and upper bounds.
    """
    won, lost = np.broadcast_arrays(np.asarray(num_won, float), np.asarray(num_lost, float))
    z = float(normal_quantile((1 + confidence) / 2))
    bounds = []
    for sign in (1.0, -1.0):  # the statistic falls in the difference: it is z at the lower bound
        left, right = np.full(won.shape, -1.0), np.full(won.shape, 1.0)
        for _ in range(60):
            middle = (left + right) / 2
            is_left = _tango_statistic(won, lost, num_pairs, middle) > sign * z
            left, right = np.where(is_left, middle, left), np.where(is_left, right, middle)
        bounds.append((left + right) / 2)
    return bounds[0], bounds[1]


def _tango_statistic(won: Floats, lost: Floats, num_pairs: int, delta: Floats) -> Floats:
    """z of the hypothesis that the difference of proportions is `delta`."""
    a = 2 * num_pairs
    b = -won - lost + (2 * num_pairs - won + lost) * delta
    c = -lost * delta * (1 - delta)
    loss = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)  # its share under `delta`
    variance = num_pairs * (2 * loss + delta * (1 - delta))
    distance = won - lost - num_pairs * delta
    with np.errstate(divide="ignore", invalid="ignore"):
        z = distance / np.sqrt(np.maximum(variance, 0))
    beyond = np.select([distance > 0, distance < 0], [np.inf, -np.inf], 0.0)
    return np.where(variance > 1e-12, z, beyond)


def tango(num_lost: int, num_won: int, num_pairs: int, confidence: float = 0.95) -> Interval:
    """`tango_bounds` of one table."""
    low, high = tango_bounds(num_lost, num_won, num_pairs, confidence)
    return Interval(
        estimate=(num_won - num_lost) / num_pairs,
        low=float(low),
        high=float(high),
        confidence=confidence,
        num_units=num_pairs,
        method="Tango's score",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), in the given order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


# --- ratios --------------------------------------------------------------------------------------


def fieller(numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of the ratio of two means of the same units (Fieller 1954).

    The ends are infinite where the mean of the denominators does not differ from 0.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    num_units = len(above)
    t = float(t_quantile((1 + confidence) / 2, num_units - 1))
    mean_above, mean_below = float(above.mean()), float(below.mean())
    covariance = np.cov(above, below) * t * t / num_units
    a = mean_below**2 - covariance[1, 1]
    b = mean_above * mean_below - covariance[0, 1]
    c = mean_above**2 - covariance[0, 0]
    ratio = mean_above / mean_below if mean_below else math.nan
    low, high = -math.inf, math.inf
    if a > 0:
        root = math.sqrt(max(b * b - a * c, 0.0))
        low, high = (b - root) / a, (b + root) / a
    return Interval(
        estimate=ratio,
        low=float(low),
        high=float(high),
        confidence=confidence,
        num_units=num_units,
        method="Fieller",
    )


def jackknife(
    statistic: Callable[[NDArray[np.int64]], float], num_units: int, confidence: float = 0.95
) -> Interval:
    """Interval of a smooth statistic, from leaving out one unit after the other (Tukey 1958).

    Args:
        statistic: of the indices of the units that it shall be computed of.
        num_units: at least two; the interval has one less degrees of freedom.
    """
    every = np.arange(num_units)
    whole = statistic(every)
    parts = np.array([statistic(np.delete(every, unit)) for unit in every])
    error = math.sqrt((num_units - 1) / num_units * float(((parts - parts.mean()) ** 2).sum()))
    half = error * float(t_quantile((1 + confidence) / 2, num_units - 1))
    return Interval(
        estimate=whole,
        low=whole - half,
        high=whole + half,
        confidence=confidence,
        num_units=num_units,
        method="t, jackknife",
    )

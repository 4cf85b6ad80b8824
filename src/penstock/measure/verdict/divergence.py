"""How far a variant's next-token distributions are from the base's, over the same tokens.

What `llama.cpp perplexity --kl-divergence` reports, of windows that `divergence_worker` computed
with both models at once, so that no logits are kept. Pure functions; the window is the unit of
every uncertainty, because tokens of one text depend on one another (llama.cpp takes tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.measure.records import Mark, Record
from penstock.measure.verdict.plan import DIVERGENCE
from penstock.measure.verdict.statistics import Interval, clustered_interval

NUM_DIGITS = 6
POSITIONS = 32  # of a window, that are computed at a time


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Along the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def window_facts(
    base: NDArray[np.float32], variant: NDArray[np.float32], targets: NDArray[np.int64]
) -> dict[str, Any]:
    """Of one window of tokens, position by position.

    Args:
        base, variant: [T, V] logits; a smaller vocabulary padding is the caller's to cut.
        targets: [T] the tokens that follow.

    Returns:
        `kl` of base from variant in nats, `nll_a`, `nll_b` of the targets, and `top1`, whether the
        most likely token is the same.
    """
    found: dict[str, Any] = {"kl": [], "nll_a": [], "nll_b": [], "top1": []}
    # A few positions at a time: float64 of all of them would be several times the logits.
    for start in range(0, len(targets), POSITIONS):
        part = slice(start, start + POSITIONS)
        first, second = log_softmax(base[part]), log_softmax(variant[part])
        follow = targets[part]
        places = np.arange(len(follow))
        # A difference of equal numbers may come out slightly negative.
        divergence = np.maximum((np.exp(first) * (first - second)).sum(axis=-1), 0.0)
        found["kl"] += _rounded(divergence)
        found["nll_a"] += _rounded(-first[places, follow])
        found["nll_b"] += _rounded(-second[places, follow])
        same = first.argmax(axis=-1) == second.argmax(axis=-1)
        found["top1"] += same.astype(int).tolist()
    return found


def figures(records: Sequence[Record]) -> dict[str, Any] | None:
    """KL divergence, top-1 agreement, ln of the ratio of perplexities; None without windows.

    `ln_ppl_ratio` is the mean of nll_b - nll_a: its exponential is PPL(variant)/PPL(base).
    `probability_change` is the change of the probability of the true token, in points.
    """
    windows = [
        record.facts for record in records if isinstance(record, Mark) and record.name == DIVERGENCE
    ]
    windows = [facts for facts in windows if facts["kl"]]
    if not windows:
        return None
    clusters = [index for index, facts in enumerate(windows) for _ in facts["kl"]]
    kl, nll_a, nll_b, top1 = (
        np.array([value for facts in windows for value in facts[name]], float)
        for name in ("kl", "nll_a", "nll_b", "top1")
    )
    change = 100 * (np.exp(-nll_b) - np.exp(-nll_a))

    def interval(values: NDArray[np.float64]) -> Interval:
        return clustered_interval(values, clusters)  # without end of one window

    marks = (0.5, 0.9, 0.99, 0.999, 1.0)
    return {
        "num_windows": len(windows),
        "num_tokens": len(kl),
        "mean_kl": interval(kl),
        "kl_quantiles": dict(
            zip(("p50", "p90", "p99", "p99.9", "max"), np.quantile(kl, marks).tolist(), strict=True)
        ),
        "top1": interval(top1),
        "ln_ppl_ratio": interval(nll_b - nll_a),
        "ppl_a": math.exp(float(nll_a.mean())),
        "ppl_b": math.exp(float(nll_b.mean())),
        "probability_change": interval(change),
        "rms_probability_change": math.sqrt(float((change**2).mean())),
    }


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{NUM_DIGITS}g}") for value in values.tolist()]

"""Has a model changed? Two tests of a window of slots against a reference. Pure functions.

First tokens: how often each token came first, sampled at temperature 1; a G test of homogeneity
for each canary with Williams' correction, summed (Sokal and Rohlf, Biometry, chapter 17; without
the correction it has two to three times the false alarms at the small levels of an alarm).
Answers: at temperature 0, how often the usual answer came; an exact test, since a model does not
always agree with itself at temperature 0 either.

Both are conditional on the margins, and what is decided from the data beforehand (which tokens are
rare, which answer is the usual one) is decided from margins: a usual answer of the reference alone
would be rarer in any window, by regression to the mean. Both take slots as independent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

LEAST_EXPECTED = 10.0  # tokens that are expected less often are counted together

STEP = 0.1  # of the logarithm of a probability


class Drift(NamedTuple):
    """What a test says."""

    statistic: float
    p_value: float
    num_reference: int
    num_window: int


def first_token_drift(
    reference: Mapping[str, Counter[str]], window: Mapping[str, Counter[str]]
) -> Drift | None:
    """Whether first tokens come from one distribution; None: there is too little to compare.

    Args:
        reference: by canary, how often each first token came.
        window: the same of the slots in question.
    """
    from scipy.stats import chi2

    statistic, freedom, num_reference, num_window = 0.0, 0, 0, 0
    for canary in sorted(reference.keys() & window.keys()):  # sums of floats have an order
        pairs = _pooled(reference[canary], window[canary])
        if len(pairs) < 2:
            continue
        totals = [sum(pair[side] for pair in pairs) for side in (0, 1)]
        both = sum(totals)
        g = 0.0
        for pair in pairs:
            for side in (0, 1):
                if pair[side]:
                    g += 2 * pair[side] * math.log(pair[side] * both / sum(pair) / totals[side])
        sides = sum(both / total for total in totals) - 1
        tokens = sum(both / sum(pair) for pair in pairs) - 1
        statistic += g / (1 + sides * tokens / (6 * both * (len(pairs) - 1)))
        freedom += len(pairs) - 1
        num_reference += totals[0]
        num_window += totals[1]
    if freedom == 0:
        return None
    return Drift(statistic, float(chi2.sf(statistic, freedom)), num_reference, num_window)


def _pooled(reference: Counter[str], window: Counter[str]) -> list[list[int]]:
    """Counts of (reference, window) by token, the rare ones together, so that chi2 holds."""
    totals = reference.total(), window.total()
    smaller = min(totals) / max(sum(totals), 1)
    pairs: list[list[int]] = []
    rest = [0, 0]
    for token in sorted(reference.keys() | window.keys()):
        pair = [reference[token], window[token]]
        if sum(pair) * smaller >= LEAST_EXPECTED:
            pairs.append(pair)
        else:
            rest = [rest[0] + pair[0], rest[1] + pair[1]]
    if sum(rest) * smaller >= LEAST_EXPECTED:
        pairs.append(rest)
    elif sum(rest) and pairs:
        least = min(pairs, key=sum)
        least[0] += rest[0]
        least[1] += rest[1]
    return pairs


def answer_drift(
    reference: Mapping[str, Counter[str]], window: Mapping[str, Counter[str]]
) -> Drift | None:
    """Whether usual answers come as often as they did; None: there is nothing to compare.

    Of each canary, the most frequent answer is the usual one, and how often it came in the window
    is hypergeometric if nothing has changed. How improbable that is, in steps of a tenth of its
    logarithm, is summed over canaries; the sum's distribution is their convolution, so the p-value
    is exact. A canary that never varied weighs more in it than one that always does.

    Args:
        reference: by canary, how often each answer came.
        window: the same of the slots in question.

    Returns:
        As statistic the share of usual answers in the window, less that in the reference.
    """
    import numpy as np
    from scipy.stats import hypergeom

    usual, totals = [0, 0], [0, 0]
    steps, chances = 0, np.ones(1)  # chances of each sum of steps
    for canary in sorted(reference.keys() & window.keys()):
        both = reference[canary] + window[canary]
        # Of equally frequent answers the first in order: the same one whenever this is computed.
        answer = max(sorted(both), key=lambda text: both[text], default="")
        num_window = window[canary].total()
        least = max(0, num_window + both[answer] - both.total())
        there = np.arange(least, min(num_window, both[answer]) + 1)
        log = hypergeom.logpmf(there, both.total(), both[answer], num_window)
        places = np.rint((log.max() - log) / STEP).astype(int)
        chances = np.convolve(chances, np.bincount(places, weights=np.exp(log)))
        steps += int(places[window[canary][answer] - least])
        for side, counts in enumerate((reference[canary], window[canary])):
            usual[side] += counts[answer]
            totals[side] += counts.total()
    if 0 in totals:
        return None
    p_value = min(1.0, float(chances[steps:].sum()))
    return Drift(usual[1] / totals[1] - usual[0] / totals[0], p_value, totals[0], totals[1])

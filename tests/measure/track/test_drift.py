"""The drift tests: they are as often wrong as they say, and find what is there."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency, fisher_exact

from penstock.measure.track.drift import answer_drift, first_token_drift

TOKENS = list("abcdefghij")
EVEN = np.ones(10) / 10
SKEWED = np.array([30, 20, 12, 10, 8, 6, 5, 4, 3, 2]) / 100


def counts(rng: np.random.Generator, shares: np.ndarray, num: int) -> Counter[str]:
    return Counter(dict(zip(TOKENS, map(int, rng.multinomial(num, shares)), strict=False)))


def test_equals_the_g_test() -> None:
    rng = np.random.default_rng(0)
    reference, window = counts(rng, EVEN, 900), counts(rng, SKEWED, 300)
    found = first_token_drift({"x": reference}, {"x": window})
    assert found is not None
    table = np.array([[side[token] for token in TOKENS] for side in (reference, window)])
    expected = chi2_contingency(table, correction=False, lambda_="log-likelihood")
    # Williams' correction as Sokal and Rohlf print it.
    num, rows, columns = table.sum(), table.sum(axis=1), table.sum(axis=0)
    q = 1 + (num * (1 / rows).sum() - 1) * (num * (1 / columns).sum() - 1) / (6 * num * 9)
    assert np.isclose(found.statistic, expected.statistic / q)
    assert np.isclose(found.p_value, chi2.sf(expected.statistic / q, 9))
    assert (found.num_reference, found.num_window) == (900, 300)


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Sparse counts, several canaries; at a level at which the test without q is wrong twice."""
    rng = np.random.default_rng(1)
    p_values = []
    for _ in range(2000):
        reference = {str(n): counts(rng, SKEWED, 192) for n in range(8)}
        window = {str(n): counts(rng, SKEWED, 96) for n in range(8)}
        found = first_token_drift(reference, window)
        assert found is not None
        p_values.append(found.p_value)
    for level in (0.05, 0.01):
        expected = 2000 * level
        assert sum(p < level for p in p_values) < expected + 3 * expected**0.5


@pytest.mark.parametrize(
    ("shares", "num_reference"),
    [([0.98, 0.02], 48), ([0.5, 0.5], 48), ([0.1] * 10, 48), ([0.5, 0.5], 6)],
)
def test_a_model_that_disagrees_with_itself_is_no_alarm(
    shares: list[float], num_reference: int
) -> None:
    """Answers at temperature 0 that come now so, now so: no usual answer is picked by luck."""
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(300):
        sides = [
            {str(n): counts(rng, np.array(shares), num) for n in range(8)}
            for num in (num_reference, 24)
        ]
        found = answer_drift(*sides)
        assert found is not None
        p_values.append(found.p_value)
    assert sum(p < 0.05 for p in p_values) < 15 + 3 * 15**0.5
    assert sum(p < 0.01 for p in p_values) < 3 + 3 * 3**0.5


def test_a_change_is_found() -> None:
    rng = np.random.default_rng(2)
    shifted = np.roll(SKEWED, 1)
    reference = {str(n): counts(rng, SKEWED, 192) for n in range(8)}
    window = {str(n): counts(rng, shifted, 96) for n in range(8)}
    found = first_token_drift(reference, window)
    assert found is not None
    assert found.p_value < 1e-6


def test_nothing_to_compare() -> None:
    rare = {"x": Counter(a=192, b=9)}, {"x": Counter(a=96, c=9)}  # fewer than 10 are expected
    assert first_token_drift(*rare) is None
    assert first_token_drift({}, {"x": Counter("aab")}) is None
    assert first_token_drift({"x": Counter("a" * 99)}, {"x": Counter("a" * 99)}) is None
    assert answer_drift({"x": Counter(["a"])}, {}) is None


def test_answers() -> None:
    reference = {"x": Counter({"red": 45, "blue": 3}), "y": Counter({"cat": 48})}
    same = {"x": Counter({"red": 23, "blue": 1}), "y": Counter({"cat": 24})}
    other = {"x": Counter({"green": 24}), "y": Counter({"cat": 20, "dog": 4})}
    found, changed = answer_drift(reference, same), answer_drift(reference, other)
    assert found is not None
    assert changed is not None
    assert found.p_value > 0.3
    assert changed.p_value < 1e-9
    assert np.isclose(changed.statistic, 20 / 48 - 93 / 96)
    better = answer_drift(same, {"x": Counter({"red": 24}), "y": Counter({"cat": 24})})
    assert better is not None
    assert better.p_value > 0.5  # one more of the usual answers is no alarm


def test_answers_of_one_canary_are_fishers_test() -> None:
    for reference, window in (((45, 3), (15, 9)), ((20, 20), (19, 1)), ((40, 0), (0, 20))):
        sides = [{"x": Counter(dict(zip("ab", pair, strict=True)))} for pair in (reference, window)]
        found = answer_drift(*sides)
        assert found is not None
        # Two-sided by distance instead of by chance: never far away, and never less than one side.
        one_sided = min(
            fisher_exact([reference, window], side).pvalue for side in ("less", "greater")
        )
        assert one_sided <= found.p_value * (1 + 1e-9) <= 3 * one_sided


def test_answers_are_compared_canary_by_canary() -> None:
    """More answers to the difficult canary are no change of the model."""
    reference = {"easy": Counter(a=90), "hard": Counter(a=5, b=5)}
    window = {"easy": Counter(a=5), "hard": Counter(a=45, b=45)}
    found = answer_drift(reference, window)
    assert found is not None
    assert found.p_value > 0.5
    noisy = Counter(a=24, b=24)
    swapped = answer_drift({"x": Counter(a=24), "y": noisy}, {"x": Counter(b=24), "y": noisy})
    assert swapped is not None
    assert swapped.p_value < 1e-9  # which of two equally frequent ones is the usual one is nothing

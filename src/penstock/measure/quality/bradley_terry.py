"""Strengths of more than two systems from pairwise outcomes (Bradley and Terry 1952)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PRIOR = 0.5  # games drawn between each pair before the first: keeps whoever wins all finite
Floats = NDArray[np.float64]


def fit(wins: Floats) -> Floats:
    """Log strengths with mean 0, by Newton's method on the log-likelihood.

    Args:
        wins: [systems, systems]; `wins[i, j]` is how often i beat j, a tie is half for each.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)).
    """
    num = len(wins)
    won = wins + PRIOR * (1 - np.eye(num)) / 2
    games = won + won.T
    strengths: Floats = np.zeros(num)
    for _ in range(100):
        chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        gradient = (won - games * chance).sum(1)
        curvature = games * chance * (1 - chance)
        hessian = np.diag(curvature.sum(1)) - curvature + 1 / num  # 1 / num: fixes the mean
        step = np.linalg.solve(hessian, gradient)
        strengths = strengths + step
        if np.abs(step).max() < 1e-10:
            break
    centred: Floats = strengths - strengths.mean()
    return centred


def table(num_systems: int, games: Sequence[tuple[int, int, float]]) -> Floats:
    """Wins as `fit` takes them, from (i, j, outcome for i) with outcomes 0, 0.5 and 1."""
    wins: Floats = np.zeros((num_systems, num_systems))
    for i, j, outcome in games:
        wins[i, j] += outcome
        wins[j, i] += 1 - outcome
    return wins


def bootstrap(
    num_systems: int,
    games_by_unit: Sequence[Sequence[tuple[int, int, float]]],
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> Floats:
    """Strengths of `num_draws` resamples of units (prompts): [draws, systems]."""
    rng = np.random.default_rng(seed)
    tables = np.array([table(num_systems, games) for games in games_by_unit])
    picks = rng.integers(0, len(tables), (num_draws, len(tables)))
    return np.array([fit(tables[pick].sum(0)) for pick in picks])

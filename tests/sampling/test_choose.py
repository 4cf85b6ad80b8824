"""The native way to choose tokens means what the sampler means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.engine.plan import Admission, StepPlan
from penstock.engine.state import DeviceState
from penstock.native import library
from penstock.native.pool import Pool
from penstock.sampling import host as sampler
from penstock.types import SamplingParams

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no native library here"
)

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 40},
    {"temperature": 1.4, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.3, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 0.48, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1e-3},
    {"temperature": 0.8, "banned_token_ids": (1, 2, 3), "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("vocab_size", [3, 300, 5000])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_native_choice_equals_the_samplers(vocab_size: int, num_threads: int) -> None:
    from penstock.native.sampling import Sampler

    choose = Sampler(Pool(library.load(), num_threads))
    random = np.random.default_rng(vocab_size)
    state = DeviceState(64, 16, 16)
    settings = [SETTINGS[row % len(SETTINGS)] for row in range(64)]
    settings = [
        {key: value for key, value in setting.items() if vocab_size > 3 or "banned" not in key}
        for setting in settings
    ]
    plan = [
        Admission(row, [0], 1, SamplingParams(**setting), int(random.integers(2**60)))
        for row, setting in enumerate(settings)
    ]
    state.apply(StepPlan([], plan, [], [(row, [row]) for row in range(64)]))
    rows = np.arange(64)
    num_equal = num_all = 0
    for _ in range(4):
        logits = random.normal(scale=2.0, size=(64, vocab_size)).astype(np.float32)
        ours = sampler.sample(logits, rows, state, (0,)).token_ids
        native = sampler.sample(logits, rows, state, (0,), choose).token_ids
        num_equal += int((ours == native).sum())
        num_all += len(ours)
        greedy = [row for row in range(64) if settings[row]["temperature"] == 0.0]
        assert (ours[greedy] == native[greedy]).all()
    # Sums are rounded in another order: a draw within about 1e-6 of an edge may fall beside it.
    assert num_equal >= num_all - 1


def test_a_row_without_a_finite_logit_does_not_disturb_the_others() -> None:
    from penstock.native.sampling import Sampler

    choose = Sampler(Pool(library.load(), 1))
    logits = np.zeros((3, 10), np.float32)
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, 7] = 50.0
    ones = np.ones(3, np.float32)
    chosen = choose(logits, ones, np.zeros(3, np.int32), ones, 0 * ones, np.full(3, 0.5))
    assert chosen.tolist() == [0, 0, 7]


def test_top_p_is_a_share_of_all_that_min_p_left() -> None:
    """Above min-p are two likely tokens and a flat tail, which has more than half of the mass."""
    from penstock.native.sampling import Sampler

    choose = Sampler(Pool(library.load(), 1))
    weights = np.array([1.0, 0.9, *[0.02] * 100], np.float32)
    logits = np.log(weights)[None].repeat(100, axis=0)
    ones = np.ones(100, np.float32)
    draws = (np.arange(100) + 0.5) / 100
    chosen = choose(logits, ones, np.zeros(100, np.int32), 0.48 * ones, 0.01 * ones, draws)
    assert set(chosen.tolist()) == {0, 1}  # 1 < 0.48 * 3.9 < 1.9


@pytest.mark.parametrize("temperature", [1e-39, 1e-45])
def test_a_temperature_without_a_finite_inverse_is_none(temperature: float) -> None:
    from penstock.native.sampling import Sampler

    choose = Sampler(Pool(library.load(), 1))
    logits = np.array([[0.0, 3.0, 2.9999, -1.0]], np.float32)
    one = np.ones(1, np.float32)
    tiny = np.array([temperature], np.float32)
    chosen = choose(logits, tiny, np.zeros(1, np.int32), one, 0 * one, np.array([0.99]))
    assert chosen.tolist() == [1]


MIXED = [
    *SETTINGS,
    {"temperature": 1.0, "typical_p": 0.9},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "typical_p": 0.5, "top_k": 30},
]


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_row_is_the_same_alone_and_among_any_others(scale: float) -> None:
    """Both ways to choose give the same, but for a draw in millions: a row must keep to one."""
    from penstock.native.sampling import Sampler

    calls: list[int] = []
    native = Sampler(Pool(library.load(), 1))

    def choose(logits: NDArray[np.float32], *settings: Any) -> NDArray[np.int64]:
        """What the library chooses, made different from what the sampler would."""
        calls.append(len(logits))
        return (native(logits, *settings) + 1) % logits.shape[1]

    num_rows, vocab_size = 3 * len(MIXED), 1000
    random = np.random.default_rng(0)
    state = DeviceState(num_rows, 16, 16)
    plan = [
        Admission(row, [0], 1, SamplingParams(**MIXED[row % len(MIXED)]), row)
        for row in range(num_rows)
    ]
    state.apply(StepPlan([], plan, [], [(row, [row]) for row in range(num_rows)]))
    rows = np.arange(num_rows)
    logits = random.normal(scale=scale, size=(num_rows, vocab_size)).astype(np.float32)
    logits[0, [3, 500]] = 50.0, np.nan
    logits[len(MIXED), :] = -np.inf
    together = sampler.sample(logits, rows, state, (0,), choose).token_ids
    assert calls
    for row in rows:
        alone = sampler.sample(logits[[row]], rows[[row]], state, (0,), choose).token_ids
        assert alone == together[row], MIXED[row % len(MIXED)]
    for _ in range(20):
        some = random.permutation(num_rows)[: random.integers(2, num_rows)]
        found = sampler.sample(logits[some], rows[some], state, (0,), choose).token_ids
        assert found.tolist() == together[some].tolist()

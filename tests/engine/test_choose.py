"""The native way to choose tokens means what the sampler means."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.engine import sampler
from penstock.engine.plan import Admission, StepPlan
from penstock.engine.state import DeviceState
from penstock.native import library
from penstock.native.pool import Pool
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

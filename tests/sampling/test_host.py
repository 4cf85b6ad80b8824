"""The sampler against an oracle that does one row at a time, in the words of the definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.sampling.helpers_oracle import (
    EOS,
    FEATURES,
    Row,
    assert_same_logprobs,
    feature_rows,
    make_state,
    oracle,
    oracle_distribution,
    oracle_logprobs,
    oracle_uniform,
    random_logits,
)

from penstock.errors import InvalidField
from penstock.sampling import host as sampler
from penstock.sampling.host import check_choice, prompt_logprobs, sample, uniform
from penstock.types import SamplingParams, TokenLogprobs


def run(
    logits: NDArray[np.float32], rows: list[Row], places: list[int] | None = None
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    places = list(range(len(rows))) if places is None else places
    result = sample(logits, np.array(places), make_state(rows, places), EOS)
    return result.token_ids.tolist(), result.logprobs


# --- every parameter, by itself and all together ---


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(("vocab_size", "scale"), [(13, 2.0), (257, 3.0), (1000, 0.5)])
def test_every_feature_equals_the_oracle(name: str, vocab_size: int, scale: float) -> None:
    num_rows, num_sure = 12, 0
    logits = random_logits(vocab_size, num_rows, vocab_size, scale)
    rows = feature_rows(vocab_size, [name] * num_rows)
    token_ids, _ = run(logits, rows)
    for i, row in enumerate(rows):
        expected, margin = oracle(logits[i], row)
        if margin > 1e-5:
            assert token_ids[i] == expected
            num_sure += 1
    assert num_sure > num_rows / 2


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, max_size=8),
    vocab_size=st.sampled_from([12, 128, 129, 300, 2048]),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 10_000),
)
def test_mixed_batches_equal_the_oracle(
    names: list[str], vocab_size: int, scale: float, seed: int
) -> None:
    logits = random_logits(seed, len(names), vocab_size, scale)
    rows = feature_rows(seed, names)
    token_ids, _ = run(logits, rows)
    for i, row in enumerate(rows):
        expected, margin = oracle(logits[i], row)
        assert margin < 1e-5 or token_ids[i] == expected


def test_a_row_is_the_same_alone_and_among_32_others() -> None:
    names = sorted(FEATURES)
    for vocab_size, scale in ((50, 3.0), (2048, 0.1), (2048, 4.0), (33_001, 1.0)):
        logits = random_logits(1, 33, vocab_size, scale)
        logits = logits.astype(np.float16).astype(np.float32)  # many ties
        rows = feature_rows(2, [names[i % len(names)] for i in range(33)])
        rows = [replace(row, params=replace(row.params, logprobs=4)) for row in rows]
        together = run(logits, rows)
        for i, row in enumerate(rows):
            token_ids, logprobs = run(logits[i : i + 1], [row])
            assert token_ids == together[0][i : i + 1]
            assert logprobs[0] == together[1][i]
        shuffled = np.random.default_rng(0).permutation(33)
        again = run(logits[shuffled], [rows[i] for i in shuffled], shuffled.tolist())
        assert again[0] == [together[0][i] for i in shuffled]
        assert again[1] == together[1]


@pytest.mark.parametrize("name", ["plain", "hot", "top_p_large", "truncations"])
def test_the_frequencies_are_those_of_the_distribution(name: str) -> None:
    vocab_size, num_draws = 40, 20_000
    logits = random_logits(3, 1, vocab_size, 0.7)
    row = Row(SamplingParams(**FEATURES[name]))
    p, _ = oracle_distribution(logits[0], row)
    state = make_state([row])
    counts = np.zeros(vocab_size)
    for start in range(0, num_draws, 100):
        rows = [replace(row, seed=start + i) for i in range(100)]
        state = make_state(rows)
        tiled = np.repeat(logits, 100, axis=0)
        counts += np.bincount(
            sample(tiled, np.arange(100), state, EOS).token_ids, minlength=vocab_size
        )
    assert not counts[p == 0].any()
    likely = p * num_draws >= 5
    chi2 = ((counts - p * num_draws)[likely] ** 2 / (p * num_draws)[likely]).sum()
    degrees = likely.sum() - 1
    assert degrees > 5
    assert chi2 < degrees + 4.5 * np.sqrt(2 * degrees)


def test_uniform_is_the_stated_function_and_uniform() -> None:
    seeds = np.array([0, 1, 2**63 - 1, 2**64 - 1], np.uint64)
    positions = np.array([0, 1, 5, 100_000], np.int32)
    expected = [oracle_uniform(int(s), int(i)) for s, i in zip(seeds, positions, strict=True)]
    assert uniform(seeds, positions).tolist() == expected
    grid = uniform(np.repeat(np.arange(300, dtype=np.uint64), 300), np.tile(np.arange(300), 300))
    assert len(np.unique(grid)) == len(grid)
    assert grid.min() >= 0
    assert grid.max() < 1
    counts = np.histogram(grid, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 99 + 4.5 * np.sqrt(2 * 99)
    by_seed = grid.reshape(300, 300)
    assert abs(np.corrcoef(by_seed[:-1].ravel(), by_seed[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        *({"banned_token_ids": (0, 1000), "top_k": k} for k in (3, 4, 6)),
        *({"top_p": p} for p in (0.5, 0.9, 0.99, 0.995, 0.9999)),
        {"top_k": 500, "top_p": 0.995},
        {"min_p": 0.01},
        {"typical_p": 0.995},
    ],
)
def test_draws_at_the_edges_give_the_first_and_the_last_token_that_stays(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """So nothing of weight 0 is drawn, and truncation leaves what it has to leave."""
    logits = random_logits(5, 4, 1001, 2.0)
    rows = [Row(SamplingParams(**options))] * 4
    for value in (0.0, 1 - 2.0**-52):
        monkeypatch.setattr(
            sampler, "uniform", lambda seed, position, v=value: np.full(len(seed), v)
        )
        token_ids, _ = run(logits, rows)
        for i, (token_id, row) in enumerate(zip(token_ids, rows, strict=True)):
            kept = np.flatnonzero(oracle_distribution(logits[i], row)[0])
            assert 0 < len(kept) < 1001
            assert token_id == (kept[0] if value == 0 else kept[-1])


def test_rows_without_a_distribution_do_not_stop_the_others() -> None:
    logits = random_logits(6, 4, 50, 1.0)
    logits[1, 7] = np.nan
    logits[2] = -np.inf
    row = Row(SamplingParams(top_p=0.9, typical_p=0.9))
    token_ids, _ = run(logits, [row] * 4)
    assert token_ids[1] == 7
    assert token_ids[0] == run(logits[:1], [row])[0][0]
    assert token_ids[3] == run(logits[3:], [row])[0][0]


def test_input_is_not_changed() -> None:
    logits = random_logits(7, len(FEATURES), 60, 1.0)
    before = logits.copy()
    run(logits, feature_rows(7, list(FEATURES)))
    assert np.array_equal(logits, before)


def test_min_tokens_ends_when_they_are_reached() -> None:
    logits = np.zeros((1, 10), np.float32)
    logits[0, 1], logits[0, 5] = 9, 8
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(5,))
    assert run(logits, [Row(params, (3, 4, 3), num_prompt=2)])[0] == [0]
    assert run(logits, [Row(params, (3, 4, 3, 3), num_prompt=2)])[0] == [1]


# --- log-probabilities ---


@pytest.mark.parametrize("vocab_size", [7, 128, 3000])
def test_logprobs_are_of_the_raw_logits(vocab_size: int) -> None:
    logits = random_logits(8, 6, vocab_size, 2.0).astype(np.float16).astype(np.float32)
    asked = [None, 0, 1, 5, 1000, 2]
    rows = [
        Row(SamplingParams(temperature=0.5, banned_token_ids=(2,), logprobs=k), seed=i)
        for i, k in enumerate(asked)
    ]
    places = [4, 0, 2, 5, 1, 9]
    token_ids, logprobs = run(logits, rows, places)
    assert sorted(logprobs) == [0, 1, 2, 5, 9]
    for i, (place, k) in enumerate(zip(places, asked, strict=True)):
        if k is not None:
            assert_same_logprobs(logprobs[place], oracle_logprobs(logits[i], token_ids[i], k))


@pytest.mark.parametrize("k", [0, 3])
def test_prompt_logprobs(k: int) -> None:
    logits = random_logits(9, 20, 500, 2.0)
    targets = np.arange(20) * 7
    found = prompt_logprobs(logits, targets, k)
    for i, one in enumerate(found):
        assert_same_logprobs(one, oracle_logprobs(logits[i], int(targets[i]), k))


# --- constraints that cannot be met ---


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"allowed_token_ids": (3, 4), "banned_token_ids": (3, 4)}, "allowed_token_ids"),
        (
            {"allowed_token_ids": (1, 6), "stop_token_ids": (6,), "min_tokens": 1},
            "allowed_token_ids",
        ),
        ({"banned_token_ids": tuple(range(10))}, "banned_token_ids"),
    ],
)
def test_constraints_that_leave_nothing_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_choice(SamplingParams(**options), EOS, 10)
    assert caught.value.field == field


def test_constraints_that_leave_one_token_pass() -> None:
    check_choice(SamplingParams(allowed_token_ids=(1, 2), min_tokens=1), EOS, 10)
    check_choice(SamplingParams(banned_token_ids=tuple(range(9))), EOS, 10)
    check_choice(SamplingParams(allowed_token_ids=(1,)), EOS, 10)

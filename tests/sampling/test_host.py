"""The sampler against an oracle that does one row at a time, in the words of the definitions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.engine.plan import Admission, StepPlan
from penstock.engine.state import DeviceState
from penstock.errors import InvalidField
from penstock.sampling import host as sampler
from penstock.sampling.host import check_choice, prompt_logprobs, sample, uniform
from penstock.types import SamplingParams, TokenLogprobs

EOS = (1,)
MAX_LEN = 64


@dataclass(frozen=True)
class Row:
    params: SamplingParams
    token_ids: tuple[int, ...] = (3, 4, 3)
    num_prompt: int = 2
    seed: int = 7


def make_state(rows: list[Row], places: list[int] | None = None) -> DeviceState:
    places = list(range(len(rows))) if places is None else places
    state = DeviceState(max(places) + 1, MAX_LEN, 16)
    admitted = [
        Admission(place, list(row.token_ids), row.num_prompt, row.params, row.seed)
        for place, row in zip(places, rows, strict=True)
    ]
    state.apply(StepPlan([], admitted, [], []))
    return state


def run(
    logits: NDArray[np.float32], rows: list[Row], places: list[int] | None = None
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    places = list(range(len(rows))) if places is None else places
    result = sample(logits, np.array(places), make_state(rows, places), EOS)
    return result.token_ids.tolist(), result.logprobs


def random_logits(seed: int, num_rows: int, vocab_size: int, scale: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


# --- the oracle ---


def f32(value: float) -> float:
    return float(np.float32(value))


def oracle_logits(logits: NDArray[np.float32], row: Row) -> NDArray[np.float64]:
    x, p = logits.astype(np.float64), row.params
    answer = row.token_ids[row.num_prompt :]
    for token_id in range(len(x)):
        if p.allowed_token_ids is not None and token_id not in p.allowed_token_ids:
            x[token_id] = -np.inf
        if token_id in p.banned_token_ids:
            x[token_id] = -np.inf
        if len(answer) < p.min_tokens and token_id in (*EOS, *p.stop_token_ids):
            x[token_id] = -np.inf
        x[token_id] += (p.logit_bias or {}).get(token_id, 0.0)
        if token_id in row.token_ids:
            x[token_id] *= p.repetition_penalty if x[token_id] < 0 else 1 / p.repetition_penalty
        x[token_id] -= p.presence_penalty * (token_id in answer)
        x[token_id] -= p.frequency_penalty * answer.count(token_id)
    return x


def oracle_keep(order: list[int], p: NDArray[np.float64], mass: float) -> tuple[list[int], float]:
    """The shortest start of `order` that reaches `mass`, and how close the decision was."""
    total, kept, margin = 0.0, [], 1.0
    for token_id in order:
        if total >= mass:
            break
        kept.append(token_id)
        total += p[token_id]
        margin = min(margin, abs(total - mass))
    return kept, margin


def oracle_distribution(logits: NDArray[np.float32], row: Row) -> tuple[NDArray[np.float64], float]:
    """The probabilities to draw from, and the smallest margin of any decision on the way."""
    params, margin = row.params, 1.0
    x = oracle_logits(logits, row) / f32(params.temperature)
    p = np.exp(x - x.max())
    p[p < f32(params.min_p)] = 0
    if params.min_p:
        margin = min(margin, float(np.abs(p - f32(params.min_p)).min()))
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1:
        kept, close = oracle_keep(order, p, f32(params.top_p))
        margin = min(margin, close)
        p[[i for i in range(len(p)) if i not in set(kept)]] = 0
        p /= p.sum()
    if params.typical_p < 1:
        surprise = -np.log(p, where=p > 0, out=np.full(len(p), -np.inf))
        entropy = float(sum(p[i] * surprise[i] for i in range(len(p)) if p[i] > 0))
        left = sorted((i for i in order if p[i] > 0), key=lambda i: abs(surprise[i] - entropy))
        kept, close = oracle_keep(left, p, f32(params.typical_p))
        margin = min(margin, close)
        p[[i for i in range(len(p)) if i not in set(kept)]] = 0
        p /= p.sum()
    return p, margin


def oracle(logits: NDArray[np.float32], row: Row) -> tuple[int, float]:
    """The token, and the smallest margin of any decision."""
    if row.params.greedy:
        x = oracle_logits(logits, row)
        return int(x.argmax()), float(np.diff(np.sort(x)[-2:])[0])
    p, margin = oracle_distribution(logits, row)
    u = oracle_uniform(row.seed, len(row.token_ids))
    cumulative = np.cumsum(p)
    return int((cumulative <= u).sum()), min(margin, float(np.abs(cumulative - u).min()))


def oracle_uniform(seed: int, position: int) -> float:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    return float(
        (mix((mix(seed & mask) + 0x9E3779B97F4A7C15 * (position + 1)) & mask) >> 12) / 2**52
    )


# --- every parameter, by itself and all together ---

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_k_of_most": {"top_k": 120},
    "top_k_of_all": {"top_k": 10_000},
    "top_p_small": {"top_p": 0.3},
    "top_p_large": {"top_p": 0.97},
    "top_p_almost_all": {"top_p": 0.995},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "min_p_top_p": {"min_p": 0.001, "top_p": 0.9},
    "truncations": {"min_p": 0.01, "top_k": 30, "top_p": 0.9, "typical_p": 0.8},
    "allowed": {"allowed_token_ids": (9, 2, 5)},
    "banned": {"banned_token_ids": (0, 1, 2)},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": (5, 7)},
    "logit_bias": {"logit_bias": {3: 4.0, 8: -100.0}},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "tiny_repetition_penalty": {"repetition_penalty": 1e-50, "banned_token_ids": (3, 5, 7, 9)},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.5},
    "everything": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.001,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {5: 2.0},
        "banned_token_ids": (0,),
        "min_tokens": 3,
        "logprobs": 3,
    },
}


def feature_rows(seed: int, names: list[str]) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        Row(
            SamplingParams(**FEATURES[name]),
            token_ids=tuple(rng.integers(0, 12, size=rng.integers(3, 12)).tolist()),
            num_prompt=int(rng.integers(1, 3)),
            seed=int(rng.integers(-(2**62), 2**62)),
        )
        for name in names
    ]


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


def oracle_logprobs(logits: NDArray[np.float32], token_id: int, k: int) -> TokenLogprobs:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    order = sorted(range(len(x)), key=lambda i: (-logits[i], i))[:k]
    rank = 1 + sum(value > logits[token_id] for value in logits)
    return TokenLogprobs(token_id, x[token_id], rank, tuple((i, x[i]) for i in order))


def assert_same_logprobs(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert (found.token_id, found.rank) == (expected.token_id, expected.rank)
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [i for i, _ in found.top] == [i for i, _ in expected.top]
    assert [p for _, p in found.top] == pytest.approx([p for _, p in expected.top], abs=1e-5)


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

"""An oracle for sampling: one row at a time, in the words of the definitions, in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.engine.plan import Admission, StepPlan
from penstock.engine.state import DeviceState
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


def random_logits(seed: int, num_rows: int, vocab_size: int, scale: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


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

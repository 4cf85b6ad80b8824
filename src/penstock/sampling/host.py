"""Logits to token ids: constraints, penalties, truncation, and one random number a token.

Owns what the sampling parameters mean; knows rows of the `SamplingRows`, neither requests nor the
model. The parts that touch [L, V] are a constant number of passes; only rows that ask for more than
temperature, top-k, top-p and min-p are looked at one by one.
Invariant: a row's token and log-probabilities never depend on the other rows, to the last bit.
Every sum over the vocabulary therefore runs in an order that is fixed by the row alone, and
truncation works with thresholds (ties stay in), so that no sorting order can matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidField
from penstock.sampling.base import Choose
from penstock.sampling.rows import SamplingRows
from penstock.types import SamplingParams, TokenLogprobs

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_BLOCK = 128  # columns that are summed at once; cumulative sums go over blocks
_MIN_REPETITION_PENALTY = 1e-20  # a smaller one does no more, until it overflows
_NUM_CANDIDATES = 64  # how many of the largest are looked at before a whole row is sorted


class SampleResult(NamedTuple):
    """The sampled tokens, and what rows with `params.logprobs` asked for."""

    token_ids: I64  # [L]
    logprobs: dict[int, TokenLogprobs]  # by row


def sample(
    logits: F32,
    rows: I64,
    state: SamplingRows,
    eos_token_ids: Sequence[int],
    choose: Choose | None = None,
) -> SampleResult:
    """The next token of each of `rows`.

    Order: logit bias, penalties, constraints (allowed, banned, `min_tokens`); then the most
    likely token, or temperature, min-p, top-k, top-p, typical-p and a draw.

    Args:
        logits: [L, V]; not changed.
        rows: [L] rows of `state`, without repeats.
        eos_token_ids: end-of-sequence tokens, for `min_tokens`.
        choose: the backend's own way to choose, for rows without typical-p.
    """
    shaped = np.flatnonzero(state.constrained[rows])
    token_ids = np.empty(len(rows), np.int64)
    if len(shaped) < len(rows):
        token_ids = _choose(logits, rows, state, choose)
    if len(shaped):
        copy = logits[shaped]
        for row_logits, row in zip(copy, rows[shaped], strict=True):
            _constrain(row_logits, int(row), state, eos_token_ids)
        token_ids[shaped] = _choose(copy, rows[shaped], state, choose)

    asked = np.flatnonzero(state.num_logprobs[rows] >= 0)
    if not len(asked):
        return SampleResult(token_ids, {})
    ks = state.num_logprobs[rows[asked]].tolist()
    found = _token_logprobs(logits[asked], token_ids[asked], ks)
    return SampleResult(token_ids, dict(zip(rows[asked].tolist(), found, strict=True)))


def prompt_logprobs(logits: F32, target_ids: I64, k: int) -> list[TokenLogprobs]:
    """What the model gave each token that was to come.

    Args:
        logits: [N, V].
        target_ids: [N], the token after each position.
        k: how many of the most likely tokens to report as well.
    """
    return _token_logprobs(logits, target_ids, [k] * len(target_ids))


def check_choice(params: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse constraints that leave no token to sample.

    Raises:
        InvalidField: `allowed_token_ids`, `banned_token_ids` and `min_tokens` exclude everything.
    """
    banned = set(params.banned_token_ids)
    if params.min_tokens > 0:
        banned |= {*eos_token_ids, *params.stop_token_ids}
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if all(token_id in banned for token_id in allowed):
        field = "banned_token_ids" if params.allowed_token_ids is None else "allowed_token_ids"
        raise InvalidField(
            f"`{field}` leaves no token that may be sampled.",
            field=field,
            hint="end and stop tokens are banned before `min_tokens`"
            if params.min_tokens
            else None,
        )


def uniform(seed: NDArray[np.uint64], position: NDArray[np.integer]) -> F64:
    """The random number in [0, 1) of a seed and a token index. [L], [L] -> [L].

    Counter based: SplitMix64 (Steele, Lea, Flood 2014), from a start that the seed is mixed into
    first, so that neighbouring seeds do not give shifted copies of one stream.
    """
    step = np.uint64(0x9E3779B97F4A7C15) * (position.astype(np.uint64) + np.uint64(1))
    bits = _mix(_mix(seed) + step)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- constraints and penalties: row by row, for the few rows that have any ---


def _constrain(logits: F32, row: int, state: SamplingRows, eos_token_ids: Sequence[int]) -> None:
    """Apply to `logits` [V], in place, all that comes before the temperature.

    What excludes a token comes last, so that no penalty ever meets an infinite logit.
    """
    params, rules, num_prompt = state.params[row], state.token_rules[row], state.num_prompt[row]
    assert params is not None, f"row {row} is free"
    token_ids = state.token_ids[row, : state.num_tokens[row]]
    if params.logit_bias:
        logits[rules.biased] += rules.biases
    if params.repetition_penalty != 1.0:
        seen = np.flatnonzero(np.bincount(token_ids))
        penalty = np.float32(max(params.repetition_penalty, _MIN_REPETITION_PENALTY))
        hit = logits[seen]
        logits[seen] = np.where(hit > 0, hit / penalty, hit * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        counts = np.bincount(token_ids[num_prompt:])
        logits[: len(counts)] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        logits[np.flatnonzero(counts)] -= np.float32(params.presence_penalty)
    if rules.allowed is not None:
        kept = logits[rules.allowed]
        logits[:] = -np.inf
        logits[rules.allowed] = kept
    logits[rules.banned] = -np.inf
    if len(token_ids) - num_prompt < params.min_tokens:
        logits[np.array(eos_token_ids, np.int64)] = -np.inf
        logits[rules.stops] = -np.inf


# --- the choice: all rows at once ---


def _choose(logits: F32, rows: I64, state: SamplingRows, choose: Choose | None) -> I64:
    """Greedy or drawn tokens; the row alone says by whom it is chosen. [L, V], [L] -> [L]"""
    greedy = state.greedy[rows]
    token_ids: I64
    if greedy.all():
        token_ids = logits.argmax(axis=1)
        return token_ids
    native = ~greedy & (state.typical_p[rows] == 1) & (choose is not None)
    if choose is not None and native.any():
        limits = state.top_k[rows], state.top_p[rows], state.min_p[rows]
        token_ids = choose(logits, state.temperature[rows] * native, *limits, _draws(rows, state))
        for index in np.flatnonzero(~native):
            token_ids[index] = logits[index].argmax()  # of NaN too what it is without `choose`
    else:
        token_ids = logits.argmax(axis=1)
    peak = logits[np.arange(len(rows)), token_ids]
    # NaN, or nothing but -inf: there is no distribution to draw from, and others must go on.
    drawn = np.flatnonzero(~greedy & ~native & np.isfinite(peak))
    if len(drawn) == len(rows):
        return _draw(logits, peak, rows, state)
    if len(drawn):
        token_ids[drawn] = _draw(logits[drawn], peak[drawn], rows[drawn], state)
    return token_ids


def _draw(logits: F32, peak: F32, rows: I64, state: SamplingRows) -> I64:
    """One draw a row by the inverse of the cumulative distribution, in order of token ids."""
    weights = logits - peak[:, None]
    weights *= (np.float32(1) / state.temperature[rows])[:, None]
    np.exp(weights, out=weights)  # relative to the most likely token, whose weight is 1
    sums = _block_sums(weights)
    if _truncate(weights, sums, rows, state):
        sums = _block_sums(weights)
    return _inverse(weights, sums, _draws(rows, state))


def _draws(rows: I64, state: SamplingRows) -> F64:
    """The random number of each row's next token. [L] -> [L]"""
    return uniform(state.seed[rows], state.num_tokens[rows])


def _block_sums(weights: F32) -> F64:
    """[R, V] -> [R, V / _BLOCK], cumulative along the row."""
    sums = np.add.reduceat(weights, np.arange(0, weights.shape[1], _BLOCK), axis=1)
    return np.cumsum(sums, axis=1, dtype=np.float64)


def _inverse(weights: F32, sums: F64, draws: F64) -> I64:
    """The token at `draws` of each row's mass: first its block, then its place in the block.

    Never a token of weight 0: the first cumulative sum *above* the target is that of a token
    that added to it.
    """
    index = np.arange(len(weights))
    target = draws * sums[:, -1]
    block = np.minimum((sums <= target[:, None]).sum(axis=1), sums.shape[1] - 1)
    target -= np.where(block > 0, sums[index, block - 1], 0.0)
    columns = block[:, None] * _BLOCK + np.arange(_BLOCK)
    inside = columns < weights.shape[1]
    columns[~inside] = 0
    within = np.cumsum(weights[index[:, None], columns] * inside, axis=1, dtype=np.float64)
    # Blocks were summed in float32, so that the target may lie a rounding error above them.
    target = np.minimum(target, np.nextafter(within[:, -1], 0.0))
    place = np.minimum((within <= target[:, None]).sum(axis=1), _BLOCK - 1)
    token_ids: I64 = np.minimum(block * _BLOCK + place, weights.shape[1] - 1)
    return token_ids


# --- truncation: the smallest weight that stays, by row ---


def _truncate(weights: F32, sums: F64, rows: I64, state: SamplingRows) -> bool:
    """Set to 0, in place, what min-p, top-k, top-p and typical-p cut off; whether they did."""
    top_k, top_p, min_p = state.top_k[rows], state.top_p[rows], state.min_p[rows]
    limits = min_p.copy()  # the largest weight is 1
    top_k = np.where(top_k < weights.shape[1], top_k, 0)
    ranked, nucleus = np.flatnonzero(top_k), np.flatnonzero((top_k == 0) & (top_p < 1))
    # Apart, because how many candidates a row looks at must not hang on another row's top-k.
    num_ranked = int(top_k.max())
    for group, num_candidates in ((ranked, num_ranked), (nucleus, _NUM_CANDIDATES)):
        if len(group):
            limits[group] = _limits(
                weights if len(group) == len(rows) else weights[group],
                sums[group, -1],
                top_k[group],
                top_p[group],
                min_p[group],
                num_candidates,
            )
    if limits.any():
        np.multiply(weights, weights >= limits[:, None], out=weights)
    typical = np.flatnonzero(state.typical_p[rows] < 1)
    for i in typical:
        _keep_typical(weights[i], float(state.typical_p[rows[i]]))
    return bool(limits.any()) or len(typical) > 0


def _limits(
    weights: F32,
    total: F64,
    top_k: NDArray[np.integer],
    top_p: F32,
    min_p: F32,
    num_candidates: int,
) -> F32:
    """The smallest weight that min-p, then top-k, then top-p leave. [R, V], [R], ... -> [R]

    Sorts about `num_candidates` of the largest weights, which must be `top_k` at least. Rows
    whose `top_p` reaches below them are done one by one.
    """
    index = np.arange(len(weights))
    bound = _lower_bound(weights, num_candidates)
    values = _descending(weights, bound)
    last = values.shape[1] - 1
    kth = np.where(top_k > 0, values[index, np.minimum(top_k - 1, last)], np.float32(0))
    limit = np.maximum(min_p, kth)

    mass = np.cumsum(values, axis=1, dtype=np.float64)
    num_left = (values >= limit[:, None]).sum(axis=1)
    target = top_p * np.where(limit > 0, mass[index, num_left - 1], total)
    edge = values[index, np.minimum((mass < target[:, None]).sum(axis=1), last)]
    limits: F32 = np.where(top_p < 1, np.maximum(limit, edge), limit)

    is_settled = (limit >= bound) | ((limit == 0) & (mass[:, -1] >= target)) | (top_p == 1)
    for i in np.flatnonzero(~is_settled):
        limits[i] = _nucleus_limit(weights[i], limit[i], float(top_p[i]))
    return limits


def _nucleus_limit(weights: F32, limit: np.float32, top_p: float) -> np.float32:
    """The smallest weight that top-p leaves of those from `limit` up, without sorting them. [V]

    The bits of positive floats are ordered as they are: their upper bits name a bucket (32 an
    octave). The mass by bucket tells in which one the edge lies, and only that one is sorted.
    """
    left = weights * (weights >= limit)
    bucket = left.view(np.uint32) >> np.uint32(18)
    mass = np.cumsum(np.bincount(bucket, weights=left)[::-1])
    target = top_p * mass[-1]
    place = min(int(np.searchsorted(mass, target)), len(mass) - 1)
    values = np.sort(left[bucket == len(mass) - 1 - place])[::-1]
    above = mass[place - 1] if place > 0 else 0.0
    inner = int(np.searchsorted(above + np.cumsum(values, dtype=np.float64), target))
    edge: np.float32 = values[min(inner, len(values) - 1)]
    return edge


def _lower_bound(values: F32, k: int) -> F32:
    """For each row a number that at least `k` of its values reach. [R, V] -> [R]

    The columns are dealt to groups; the k-th largest of the groups' maxima is such a number, and
    few values beyond the k largest reach it. -inf if there are not enough groups.
    """
    num_rows, vocab_size = values.shape
    num_groups = min(vocab_size // 8, 2048)
    if 2 * k > num_groups:
        return np.full(num_rows, -np.inf, np.float32)
    dealt = values[:, : vocab_size // num_groups * num_groups]
    maxima = dealt.reshape(num_rows, -1, num_groups).max(axis=1)
    maxima.partition(num_groups - k, axis=1)
    bound: F32 = maxima[:, num_groups - k]
    return bound


def _descending(weights: F32, bound: F32) -> F32:
    """The weights of each row from `bound` up, largest first, padded with 0. [R, V] -> [R, C]"""
    mask = weights >= bound[:, None]
    counts = np.count_nonzero(mask, axis=1)
    values = np.zeros((len(weights), max(1, int(counts.max()))), np.float32)
    values[np.arange(values.shape[1]) < counts[:, None]] = weights[mask]
    values.sort(axis=1)
    return values[:, ::-1]


def _keep_typical(weights: F32, mass: float) -> None:
    """Set to 0, in place, what is not locally typical (Meister et al. 2022). [V]

    Tokens whose surprise is closest to the entropy stay, as many as reach `mass`.
    """
    left = np.flatnonzero(weights)
    p = weights[left].astype(np.float64)
    p /= p.sum()
    surprise = -np.log(p)
    distance = np.abs(surprise - (p * surprise).sum())
    order = np.argsort(distance, kind="stable")
    edge = min(int(np.searchsorted(np.cumsum(p[order]), mass)), len(left) - 1)
    weights[left[distance > distance[order[edge]]]] = 0


# --- log-probabilities ---


def _token_logprobs(logits: F32, token_ids: I64, ks: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probability, rank and the `ks[i]` most likely tokens, by row. [N, V], [N], N -> N"""
    peak = logits.max(axis=1)
    weights = logits - peak[:, None]
    np.exp(weights, out=weights)
    norm = peak + np.log(_block_sums(weights)[:, -1])
    chosen = logits[np.arange(len(token_ids)), token_ids]
    ranks = 1 + np.count_nonzero(logits > chosen[:, None], axis=1)
    return [
        TokenLogprobs(*values)
        for values in zip(
            token_ids.tolist(),
            (chosen - norm).tolist(),
            ranks.tolist(),
            _most_likely(logits, norm, ks),
            strict=True,
        )
    ]


def _most_likely(logits: F32, norm: F64, ks: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The `ks[i]` largest of row i as (token id, logprob); of equal ones the lower id first."""
    k = min(max(ks), logits.shape[1])
    if k == 0:
        return [()] * len(ks)
    mask = logits >= _lower_bound(logits, k)[:, None]
    found = []
    for row, k in enumerate(ks):  # one at a time: a mask may leave much of a small vocabulary
        token_ids = np.flatnonzero(mask[row])
        values = logits[row, token_ids]
        order = np.argsort(-values, kind="stable")[:k]
        logprobs = values[order] - norm[row]
        found.append(tuple(zip(token_ids[order].tolist(), logprobs.tolist(), strict=True)))
    return found

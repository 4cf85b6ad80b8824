"""What comes before and beside the choice on the device: constraints, typical-p, log-probabilities.

Owns what `kernels.sample` does not do, as torch operations on few rows; `sampling.host` means the
same, row by row. Knows logits and what a piece of rows asks for, no tables of rows.
Invariant: nothing waits for the device, and every sum over a row is of integers, so that a row
never depends on what other rows are computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.draws import SCALE, units
from penstock.kernels.transfer import upload
from penstock.sampling.rows import SamplingRows

_MIN_REPETITION_PENALTY = 1e-20  # as in `sampling.host`
_NUM_TOKENS = 16384  # of a row's history that are counted at once
_LOW = 0xFFFFFFFF


class Constraints(NamedTuple):
    """What changes the logits of S rows before their temperature counts: on the device."""

    excluded: Tensor  # [S, V] bool
    stops: Tensor  # [S, V] bool, what `min_tokens` excludes as long as it lasts
    min_tokens: Tensor  # [S] int32
    num_prompt: Tensor  # [S] int32
    bias_places: Tensor  # [B] int64, in the flat logits
    biases: Tensor  # [B] float32
    penalties: Tensor | None  # [3, S] float32: repetition, frequency, presence

    @classmethod
    def of(
        cls,
        rows: NDArray[np.integer],
        state: SamplingRows,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> Constraints:
        """Those of `rows` [S], which may have none; one copy to the device."""
        rules = [state.token_rules[row] for row in rows]
        params = [state.params[row] for row in rows]
        eos = np.array(eos_token_ids, np.int64)
        allowed = [eos[:0] if one.allowed is None else one.allowed for one in rules]
        repetition, *others = (
            np.array([getattr(one, f"{name}_penalty") for one in params], np.float32)
            for name in ("repetition", "frequency", "presence")
        )
        least = np.float32(_MIN_REPETITION_PENALTY)
        has_penalties = any(array.any() for array in (repetition != 1, *others))
        arrays = (
            _places([one.biased for one in rules], vocab_size),
            np.concatenate([one.biases for one in rules]),
            np.array([i for i, one in enumerate(rules) if one.allowed is not None], np.int64),
            _places(allowed, vocab_size),
            _places([one.banned for one in rules], vocab_size),
            _places([np.concatenate([eos, one.stops]) for one in rules], vocab_size),
            np.array([one.min_tokens for one in params if one is not None], np.int32),
            state.num_prompt[rows],
            np.concatenate([np.maximum(repetition, least), *others]),
        )
        there = upload(arrays, device)
        biased, biases, limited, kept, banned, stopping, min_tokens, num_prompt = there[:8]
        masks = torch.zeros((2, len(rows), vocab_size), dtype=torch.bool, device=device)
        excluded, stops = masks[0], masks[1]
        excluded.index_fill_(0, limited, True)
        excluded.view(-1).index_fill_(0, kept, False).index_fill_(0, banned, True)
        stops.view(-1).index_fill_(0, stopping, True)
        return cls(
            excluded,
            stops,
            min_tokens,
            num_prompt,
            biased,
            biases.view(torch.float32),
            there[8].view(torch.float32).view(3, -1) if has_penalties else None,
        )


def _places(token_ids: list[NDArray[np.int64]], vocab_size: int) -> NDArray[np.int64]:
    """Where each row's tokens are in the flat logits."""
    return np.concatenate([row * vocab_size + ids for row, ids in enumerate(token_ids)])


def constrain(logits: Tensor, constraints: Constraints, tokens: Tensor, num_tokens: Tensor) -> None:
    """Apply to `logits`, in place, all that comes before the temperature.

    What excludes a token comes last, so that no penalty ever meets an infinite logit.

    Args:
        logits: [S, V] float32, in one piece.
        tokens: [S, W] int32, the tokens of each row from its first on; read for penalties only.
        num_tokens: [S] int32, how many of them there are, W at most.
    """
    logits.view(-1).index_add_(0, constraints.bias_places, constraints.biases)
    if constraints.penalties is not None:
        penalties, num_prompt = constraints.penalties[:, :, None], constraints.num_prompt[:, None]
        _penalize(logits, penalties, num_prompt, tokens, num_tokens[:, None])
    logits.masked_fill_(constraints.excluded, -torch.inf)
    is_short = num_tokens - constraints.num_prompt < constraints.min_tokens
    logits.masked_fill_(constraints.stops & is_short[:, None], -torch.inf)


def _penalize(
    logits: Tensor, penalties: Tensor, num_prompt: Tensor, tokens: Tensor, num_tokens: Tensor
) -> None:
    """Repetition, over prompt and answer, then frequency and presence, over the answer."""
    seen, counts = torch.zeros((2, *logits.shape), dtype=torch.int32, device=logits.device)
    for start in range(0, tokens.shape[1], _NUM_TOKENS):
        token_ids = tokens[:, start : start + _NUM_TOKENS].long()
        position = torch.arange(start, start + token_ids.shape[1], device=logits.device)
        is_token = position < num_tokens
        token_ids.masked_fill_(~is_token, 0)
        seen.scatter_add_(1, token_ids, is_token.int())
        counts.scatter_add_(1, token_ids, (is_token & (position >= num_prompt)).int())
    repetition, frequency, presence = penalties
    hit = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits.copy_(torch.where(seen > 0, hit, logits))
    logits.sub_(frequency * counts).sub_(presence * (counts > 0))


def keep_typical(weights: Tensor, mass: Tensor) -> None:
    """Set to 0, in place, what is not locally typical (Meister et al. 2022). [S, V], [S]

    Tokens whose surprise is closest to the entropy stay, as many as reach `mass`.
    """
    left = weights > 0
    p = weights.double() / (units(weights).sum(1, keepdim=True) / SCALE)
    surprise = torch.where(left, -p.log(), 0)
    entropy = units(p * surprise).sum(1, keepdim=True) / SCALE
    distance = torch.where(left, (surprise - entropy).abs(), torch.inf)
    ordered, order = distance.sort(dim=1, stable=True)
    reached = units(p).gather(1, order).cumsum(1)
    target = (mass.double() * SCALE).ceil().long()[:, None]
    last = left.sum(1, keepdim=True) - 1
    place = (reached < target).sum(1, keepdim=True).minimum(last).clamp_(min=0)
    weights.masked_fill_(distance > ordered.gather(1, place), 0)


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> Tensor:
    """Log-probability, rank and the k most likely tokens, of equal ones the lower id first.

    Args:
        logits: [S, V] float32.
        token_ids: [S] integers.

    Returns:
        [S, 3 + 2 k] float64: token id, log-probability, rank, token ids, log-probabilities.
    """
    peak = logits.amax(1, keepdim=True)
    mass = units((logits - peak).exp_()).sum(1, keepdim=True) / SCALE
    # Without a finite peak there is no distribution, and integers would hide it.
    norm = torch.where(peak.isfinite(), peak + mass.log(), torch.nan)
    index = token_ids.long()[:, None]
    chosen = logits.gather(1, index)
    rank = 1 + (logits > chosen).sum(1, keepdim=True)
    found = [index, chosen - norm, rank]
    if k:
        top = _most_likely(logits, k)
        found += [top, logits.gather(1, top) - norm]
    return torch.cat([part.double() for part in found], dim=1)


def _most_likely(logits: Tensor, k: int) -> Tensor:
    """The ids of the k largest, sorted. [S, V] -> [S, k]

    By integers that have the logit, ordered, in the upper bits, and the id, downwards, in the
    lower: no two are equal, so that the order is no accident.
    """
    bits = torch.where(logits == 0, 0, logits).view(torch.int32)  # -0 is 0
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    key += _LOW - torch.arange(logits.shape[1], device=logits.device)
    return _LOW - (key.topk(k, dim=1).values & _LOW)

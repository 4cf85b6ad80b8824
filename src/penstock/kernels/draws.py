"""Choosing tokens in parts, in plain torch: weights, truncation, random numbers.

Owns what `kernels.sample` and the ways to choose that it has not have in common. Nothing here waits
for the device. Invariant: every sum over a row here is of integers, so that no order of adding up,
and no other row, can show in a token.
"""

from __future__ import annotations

import torch

GREEDY = 1e-5  # temperatures below it, as in `SamplingParams.greedy`
SCALE = 2.0**44  # units of mass in 1.0; sums of up to 2**19 weights fit into 63 bits


def relative_weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Relative to the most likely token, whose weight is 1. [L, V] float32, [L] -> [L, V]"""
    inverse = torch.where(temperature >= GREEDY, 1 / temperature, 1.0)
    return logits.sub(logits.amax(dim=1, keepdim=True)).mul_(inverse[:, None]).exp_()


def units(weights: torch.Tensor) -> torch.Tensor:
    """Weights in [0, 1] as integers, whose sums are exact in any order."""
    return weights.double().mul_(SCALE).long()


def truncate(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """Set to 0, in place, what min-p, then top-k, then top-p cut off. [L, V], the others [L]"""
    ordered = weights.sort(dim=1, descending=True).values
    is_ranked = (top_k > 0) & (top_k < weights.shape[1])
    last = torch.where(is_ranked, top_k - 1, 0).long()
    kth = ordered.gather(1, last[:, None])[:, 0]
    limit = torch.where(is_ranked, kth.maximum(min_p), min_p)[:, None]
    mass = units(ordered.masked_fill_(ordered < limit, 0)).cumsum(1)
    target = (top_p.double() * mass[:, -1].double()).ceil().long()[:, None]
    place = (mass < target).sum(1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    edge = torch.where(top_p[:, None] < 1, ordered.gather(1, place), 0)
    weights.masked_fill_(weights < limit.maximum(edge), 0)


def draw(weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The token at the random number of each row's mass, by id. [L, V], [L], [L] -> [L] int64"""
    mass = units(weights).cumsum(1)
    step = (positions.long() + 1) * _signed(0x9E3779B97F4A7C15)
    uniform = _shifted(_mixed(_mixed(seeds) + step), 12).double() * 2.0**-52
    target = (uniform * mass[:, -1].double()).long().minimum(mass[:, -1] - 1)
    token_ids: torch.Tensor = (mass <= target[:, None]).sum(1).clamp_(max=weights.shape[1] - 1)
    return token_ids


def _signed(bits: int) -> int:
    return bits - 2**64


def _shifted(x: torch.Tensor, count: int) -> torch.Tensor:
    """x >> count of the bits of an unsigned number."""
    shifted: torch.Tensor = (x >> count) & (2 ** (64 - count) - 1)
    return shifted


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)

"""Attention of every kind in plain torch, row by row: the oracle of what models ask for.

Owns windows, soft caps, sinks, encoders' attention and latents. Whoever needs none of these takes
`reference`, which is faster. Holds no state.

Invariant: scores and sums are fp32, whatever the format of the input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from penstock.attention.base import TorchBatch


class Kind(NamedTuple):
    """How the scores of a layer become weights."""

    scale: float
    window: int = 0  # tokens that a query sees, itself included; 0: all
    softcap: float = 0.0
    sinks: torch.Tensor | None = None  # [H]
    is_causal: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether it is causal attention and nothing else."""
        return self == Kind(self.scale)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kind: Kind, batch: TorchBatch
) -> torch.Tensor:
    """Attention of q [T, H, D] over the slots of the batch's rows, [T, H, Dv].

    Args:
        keys: [num_slots, Hkv, D], those of this step included.
        values: [num_slots, Hkv, Dv].
    """
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    start = 0
    for row, (length, context_len) in enumerate(
        zip(batch.lengths, batch.context_lens, strict=True)
    ):
        positions = torch.arange(context_len, device=q.device)
        blocks = batch.block_table[row, positions // batch.block_size].long()
        slots = blocks * batch.block_size + positions % batch.block_size
        stop = start + length
        out[start:stop] = _row(q[start:stop], keys[slots], values[slots], kind)
        start = stop
    return out


def _row(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The last queries of a row [N, H, D] over its keys [S, Hkv, D] and values: [N, H, Dv]."""
    num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads, _ = keys.shape
    queries = q.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, -1)
    scores = torch.einsum("nkgd,skd->kgns", queries, keys.float()) * kind.scale
    if kind.softcap:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    at = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    seen = torch.arange(num_keys, device=q.device)[None]
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if kind.is_causal:
        hidden |= seen > at
    if kind.window:
        hidden |= seen <= at - kind.window
    scores.masked_fill_(hidden, -math.inf)
    if kind.sinks is not None:
        sinks = kind.sinks.float().view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    out = torch.einsum("kgns,skd->nkgd", weights, values.float())
    return out.reshape(num_queries, num_heads, -1).to(q.dtype)

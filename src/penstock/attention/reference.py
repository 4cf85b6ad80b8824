"""Attention in plain torch: the oracle of every other backend, and what runs without a compiler.

Owns one scratch buffer, into which the blocks of a few rows at a time are gathered. Rows of one
query are computed together; a row of several is computed alone, in pieces of queries.

Invariant: padding is masked, so that a row's result depends on its neighbours only in the
rounding of sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional

from penstock.attention import PIECE_LEN
from penstock.attention.base import AttentionLayer, AttentionShape, TorchBatch

# Rows of one query are gathered in groups of about this size: small enough to stay in the cache
# between the gather and the products, large enough to hide the cost of a call. Bounds padding too.
GROUP_BYTES = 4 << 20


class _Group(NamedTuple):
    """N rows of one query each, padded to S slots."""

    tokens: torch.Tensor | None  # [N] where the queries are in the batch; None: all of it, in order
    num_rows: int
    blocks: torch.Tensor  # [N * S / block_size]
    gathered: torch.Tensor  # [2 * Hkv, N * S / block_size, block_size * D], scratch
    keys: torch.Tensor  # [Hkv * N, D, S], a view of gathered
    values: torch.Tensor  # [Hkv * N, S, D], a view of gathered
    bias: torch.Tensor  # [Hkv * N, 1, S], 0 or -inf


class _Piece(NamedTuple):
    """Queries [start, stop) of the batch; the last of them sees S tokens of its row."""

    start: int
    stop: int
    keys: torch.Tensor  # [Hkv, 1, S, D], a view of the run's gathered blocks
    values: torch.Tensor  # [Hkv, 1, S, D]
    bias: torch.Tensor  # [stop - start, S]


class _Run(NamedTuple):
    """One row of several queries."""

    blocks: torch.Tensor
    gathered: torch.Tensor  # [2 * Hkv, blocks, block_size * D], scratch
    pieces: list[_Piece]


class _Plan(NamedTuple):
    groups: list[_Group]
    runs: list[_Run]


class ReferenceAttention:
    """Implements `AttentionBackend` for fp32 and bf16. A plan holds until the next one is made."""

    name = "reference"

    def __init__(self) -> None:
        self._scratch = torch.empty(0)
        self._causal = torch.empty(0, 0)  # [PIECE_LEN, S]: what the last queries of S tokens see
        self._index = torch.empty(0, dtype=torch.int32)  # 0, 1, 2, ...

    def unsupported(self, shape: AttentionShape, kv_dtype: torch.dtype) -> list[str]:
        """Why this backend cannot serve such a model; empty if it can."""
        reasons = []
        if kv_dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"the KV format must be float32 or bfloat16, not `{kv_dtype}`")
        if shape.num_heads % shape.num_kv_heads:
            reasons.append(
                f"`{shape.num_heads}` query heads cannot share `{shape.num_kv_heads}` KV heads"
            )
        return reasons

    def plan(self, batch: TorchBatch) -> _Plan:
        """Choose groups and pieces; make masks, block indices and every view of the scratch."""
        singles: list[tuple[int, int]] = []  # (row, its first token)
        several: list[tuple[int, int]] = []
        if len(batch.input_ids) == len(batch.lengths):
            singles = [(row, row) for row in range(len(batch.lengths))]
        else:
            start = 0
            for row, length in enumerate(batch.lengths):
                (singles if length == 1 else several).append((row, start))
                start += length
        blocks_of = [-(-length // batch.block_size) for length in batch.context_lens]
        block_bytes = _block_numel(batch) * batch.kv.dtype.itemsize
        cuts = _cut(singles, blocks_of, max(1, GROUP_BYTES // block_bytes))
        self._reserve(
            batch,
            max([len(cut) * _widest(cut, blocks_of) for cut in cuts], default=0),
            [blocks_of[row] for row, _ in several],
        )
        in_order = len(cuts) == 1 and not several
        return _Plan(
            [self._group(batch, cut, blocks_of, in_order) for cut in cuts],
            [self._run(batch, row, start, blocks_of[row]) for row, start in several],
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: AttentionLayer,
        batch: TorchBatch,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        batch.kv.write(layer.kv_index, k, v, batch.slot_mapping)
        plan: _Plan = batch.meta
        store = batch.kv.blocks(layer.kv_index, batch.block_size)
        if not plan.runs and len(plan.groups) == 1:
            return _attend_group(q, plan.groups[0], store, layer.scale)
        out = q.new_empty(q.shape)
        for group in plan.groups:
            assert group.tokens is not None
            queries = q.index_select(0, group.tokens)
            out.index_copy_(0, group.tokens, _attend_group(queries, group, store, layer.scale))
        for run in plan.runs:
            torch.index_select(store, 1, run.blocks, out=run.gathered)
            for piece in run.pieces:
                _attend_piece(q, piece, layer.scale, out[piece.start : piece.stop])
        return out

    def _reserve(self, batch: TorchBatch, group_blocks: int, run_blocks: list[int]) -> None:
        """Grow the buffers to what the plan needs; by half more, as contexts grow by a token."""
        kv, device = batch.kv, batch.kv.data.device
        blocks = max([group_blocks, *run_blocks])
        numel = blocks * _block_numel(batch)
        if self._scratch.numel() < numel or self._scratch.dtype != kv.dtype:
            self._scratch = torch.empty(numel * 3 // 2, dtype=kv.dtype, device=device)
        num_slots = blocks * batch.block_size
        if self._index.numel() < num_slots:
            self._index = torch.arange(num_slots * 3 // 2, dtype=torch.int32, device=device)
        num_slots = max(run_blocks, default=0) * batch.block_size
        if self._causal.shape[1] < num_slots or self._causal.dtype != kv.dtype:
            num_slots = max(num_slots * 3 // 2, PIECE_LEN)
            mask = torch.full((PIECE_LEN, num_slots), -math.inf, dtype=kv.dtype, device=device)
            self._causal = mask.triu_(num_slots - PIECE_LEN + 1)

    def _gathered(self, batch: TorchBatch, num_blocks: int) -> torch.Tensor:
        return self._scratch[: num_blocks * _block_numel(batch)].view(
            2 * batch.kv.num_kv_heads, num_blocks, batch.block_size * batch.kv.head_dim
        )

    def _group(
        self,
        batch: TorchBatch,
        cut: list[tuple[int, int]],
        blocks_of: list[int],
        in_order: bool,
    ) -> _Group:
        num_rows, kv = len(cut), batch.kv
        blocks_wide = _widest(cut, blocks_of)
        num_slots = blocks_wide * batch.block_size
        blocks, context_len, tokens = batch.block_table, batch.context_len, None
        if not in_order:
            rows = torch.tensor([row for row, _ in cut], device=blocks.device)
            tokens = torch.tensor([token for _, token in cut], device=blocks.device)
            blocks, context_len = blocks[rows], context_len[rows]
        context_len = context_len[:, None]
        # What a row does not use may hold anything: block 0 is always there, and finite.
        first_slots = self._index[: num_slots : batch.block_size]
        blocks = blocks[:, :blocks_wide].masked_fill(first_slots >= context_len, 0).flatten()
        bias = torch.zeros(num_rows, num_slots, dtype=kv.dtype, device=blocks.device)
        bias.masked_fill_(self._index[:num_slots] >= context_len, -math.inf)
        gathered = self._gathered(batch, num_rows * blocks_wide)
        flat = gathered.view(2, kv.num_kv_heads * num_rows, num_slots, kv.head_dim)
        return _Group(
            tokens=tokens,
            num_rows=num_rows,
            blocks=blocks,
            gathered=gathered,
            keys=flat[0].transpose(1, 2),
            values=flat[1],
            bias=bias.repeat(kv.num_kv_heads, 1)[:, None],
        )

    def _run(self, batch: TorchBatch, row: int, start: int, num_blocks: int) -> _Run:
        kv, length, context_len = batch.kv, batch.lengths[row], batch.context_lens[row]
        gathered = self._gathered(batch, num_blocks)
        keys, values = gathered.view(2, kv.num_kv_heads, 1, -1, kv.head_dim)
        pieces = []
        for first in range(0, length, PIECE_LEN):
            last = min(first + PIECE_LEN, length)
            visible = context_len - length + last  # of the last query of the piece
            pieces.append(
                _Piece(
                    start=start + first,
                    stop=start + last,
                    keys=keys[:, :, :visible],
                    values=values[:, :, :visible],
                    bias=self._causal[first - last :, self._causal.shape[1] - visible :],
                )
            )
        return _Run(batch.block_table[row, :num_blocks].contiguous(), gathered, pieces)


def _block_numel(batch: TorchBatch) -> int:
    return 2 * batch.kv.num_kv_heads * batch.block_size * batch.kv.head_dim


def _widest(cut: list[tuple[int, int]], blocks_of: list[int]) -> int:
    return max(blocks_of[row] for row, _ in cut)


def _cut(
    singles: list[tuple[int, int]], blocks_of: list[int], max_blocks: int
) -> list[list[tuple[int, int]]]:
    """Cut rows into groups that, padded to their longest, gather at most `max_blocks` blocks.

    Groups are filled from the longest row on, so that rows of like length meet. A row that is
    longer than that is a group of its own.
    """
    if not singles:
        return []
    if len(singles) * _widest(singles, blocks_of) <= max_blocks:
        return [singles]
    singles = sorted(singles, key=lambda single: -blocks_of[single[0]])
    cuts, first = [], 0
    while first < len(singles):
        num_rows = max(1, max_blocks // blocks_of[singles[first][0]])
        cuts.append(singles[first : first + num_rows])
        first += num_rows
    return cuts


def _attend_group(
    q: torch.Tensor, group: _Group, store: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of q [N, H, D], one query a row. Query heads of one KV head form a matrix."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = len(store) // 2
    torch.index_select(store, 1, group.blocks, out=group.gathered)
    by_kv_head = (num_kv_heads * num_rows, num_heads // num_kv_heads, head_dim)
    queries = q.reshape(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(by_kv_head)
    scores = torch.baddbmm(group.bias, queries, group.keys, alpha=scale)
    out = torch.bmm(torch.softmax(scores, -1), group.values)
    return out.view(num_kv_heads, num_rows, -1, head_dim).transpose(0, 1).reshape(q.shape)


def _attend_piece(q: torch.Tensor, piece: _Piece, scale: float, out: torch.Tensor) -> None:
    """Attention of the queries of a piece into out [N, H, D].

    KV heads are the batch and the query heads of one are its heads, so that keys and values are
    broadcast as they are instead of being repeated.
    """
    num_kv_heads, _, num_slots, head_dim = piece.keys.shape
    by_kv_head = (piece.stop - piece.start, num_kv_heads, -1, head_dim)
    queries = q[piece.start : piece.stop].reshape(by_kv_head).permute(1, 2, 0, 3)
    shape = (num_kv_heads, queries.shape[1], num_slots, head_dim)
    result = functional.scaled_dot_product_attention(
        queries,
        piece.keys.expand(shape),
        piece.values.expand(shape),
        attn_mask=piece.bias,
        scale=scale,
    )
    out.view(by_kv_head).permute(1, 2, 0, 3).copy_(result)

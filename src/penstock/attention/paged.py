"""The batch that one step computes on a device, and the seam behind which its attention is.

Owns `DeviceBatch` (every tensor a leaf may read), `PagedLayer`, the `PagedAttention` protocol (six
verbs, so that kernel libraries can take the place of our own kernels), and the backend of our own
kernels. Knows no requests: a row of a batch is a run of tokens with a context.

Invariant: nothing here waits for the device. What a plan needs on the host, the batch has there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from penstock.attention.base import AttentionShape
from penstock.attention.pages import PAGE_DTYPES, KVPages
from penstock.errors import ConfigError
from penstock.kernels import gpu, paged
from penstock.kernels.chip import chip
from penstock.kernels.op import triton_problem
from penstock.kernels.paged_decode import paged_decode, splits_of
from penstock.kernels.paged_prefill import (
    paged_prefill,
    programs_at_once,
    rows_of_tile,
    schedule,
)
from penstock.kernels.transfer import upload

MAX_BLOCK_SIZE = 256  # tokens


class PagedLayer(NamedTuple):
    """What may differ from one attention layer of a model to the next."""

    kv_index: int  # which layer of the pages is its own
    scale: float  # factor on the scores, usually head_dim ** -0.5
    window: int = 0  # a query sees itself and the window - 1 tokens before; 0: all before
    soft_cap: float = 0.0  # scores become soft_cap * tanh(score / soft_cap); 0: they stay
    sinks: torch.Tensor | None = None  # [H] float32: a logit more in each head's denominator


@dataclass(slots=True)
class DeviceBatch:
    """One step: T tokens in R rows.

    Row r holds the tokens [query_start[r], query_start[r + 1]) of the flat tensors. They are the
    last of the `context_len[r]` tokens that its last query may see; the earlier ones are in the
    pages already. Token i of the request lies in block `block_table[rows[r], i // block_size]`, at
    `i % block_size`. Every token belongs to a row, and every row has one.
    """

    input_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32, index of the token in its request
    slots: torch.Tensor  # [T] int64, block * block_size + offset: where key and value are written
    rows: torch.Tensor  # [R] int32, rows of block_table
    query_start: torch.Tensor  # [R + 1] int32
    context_len: torch.Tensor  # [R] int32, the tokens of this step included
    block_table: torch.Tensor  # [N, M] int32, permanent; entries past a context are not read
    logit_rows: torch.Tensor  # [L] int64, the tokens whose logits are wanted
    # What is known on the host anyway, so that nobody reads tensors back.
    lengths: list[int]  # [R] query tokens of the row
    max_context_len: int  # upper bound of context_len
    kv: KVPages
    attention: PagedAttention
    meta: Any = None  # what `attention.plan(batch)` returned; only that backend reads it
    contexts: list[int] | None = None  # context_len on the host, for backends that plan by it


class PagedAttention(Protocol):
    """Causal attention over pages. Stateless but for scratch: the plan travels in the batch."""

    @property
    def name(self) -> str:
        """How a user calls it."""

    def unsupported(
        self, shape: AttentionShape, kv_dtype: str, block_size: int, device: torch.device
    ) -> list[str]:
        """Why this backend cannot serve such a model there; empty if it can."""

    def plan(self, batch: DeviceBatch) -> Any:
        """Prepare, once a step, what all layers share; the caller puts it into `batch.meta`."""

    def forward(self, q: torch.Tensor, layer: PagedLayer, batch: DeviceBatch) -> torch.Tensor:
        """[T, H, D] from q [T, H, D], which may be strided but for its last dimension.

        Keys and values of the step are in the pages already. A query sees the tokens of its row at
        its own position and before, as far as the window goes. Query head h reads KV head
        h // (H // Hkv).
        """

    def capture(self, batch: DeviceBatch) -> Any:
        """A plan for a CUDA graph over these very tensors.

        Every row has one token and a context of at most `batch.max_context_len`; what they are is
        read on the device at each replay, so that the tensors may change between replays.
        """

    def refresh(self, batch: DeviceBatch, meta: Any) -> None:
        """Called before each replay, after the batch's tensors and `contexts` have changed."""


class _Plan(NamedTuple):
    """Rows of one token and the work of the others; either may be none."""

    decode_rows: torch.Tensor  # [n] int32
    counters: torch.Tensor  # [max(n, num_shares) * Hkv] int32 or more, zeros between the kernels
    work: torch.Tensor | None = None  # [pieces, 4] int32
    num_shares: int = 0  # pieces of work that are shares of a tile
    block_m: int = 0  # of a tile


class TritonAttention:
    """Implements `PagedAttention` with the kernels of this package.

    Where those run as their references, this runs as well: on a CPU, for tests.
    """

    name = "triton"

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        # Replaced by longer ones, never changed: a captured plan goes on with what it has.
        self._counters = torch.empty(0, dtype=torch.int32)
        self._every_row = torch.empty(0, dtype=torch.int32)  # 0, 1, 2, ...

    def unsupported(
        self, shape: AttentionShape, kv_dtype: str, block_size: int, device: torch.device
    ) -> list[str]:
        """Why these kernels cannot serve such a model there; empty if they can."""
        reasons = []
        problem = triton_problem()
        if problem is not None and not os.environ.get("PENSTOCK_KERNELS"):
            reasons.append(problem)
        fp8_problem = gpu.fp8_problem() if kv_dtype == "fp8" and device.type == "cuda" else None
        if fp8_problem is not None:
            reasons.append(fp8_problem)
        reasons += head_problems(shape)
        if kv_dtype not in PAGE_DTYPES:
            reasons.append(f"the KV format must be one of {_listed(PAGE_DTYPES)}, not `{kv_dtype}`")
        if not 1 <= block_size <= MAX_BLOCK_SIZE:
            reasons.append(f"a block must have 1 to {MAX_BLOCK_SIZE} tokens, not `{block_size}`")
        if shape.head_dim % 2 or not 8 <= shape.head_dim <= 256:
            reasons.append(f"heads must have an even size from 8 to 256, not `{shape.head_dim}`")
        return reasons

    def plan(self, batch: DeviceBatch) -> _Plan:
        """List rows of one token and work for the others; one small copy to the device, if any.

        How contexts are shared follows from `batch.contexts`, or, without it, from the bound.
        """
        longest = max(batch.lengths, default=1)
        if longest == 1:
            return self.capture(batch)
        shape, device = self._shape, batch.input_ids.device
        group = shape.num_heads // shape.num_kv_heads
        block_m = rows_of_tile(longest, group, shape.head_dim, chip(device))
        work, num_shares = schedule(
            batch.lengths,
            batch.contexts or [batch.max_context_len] * len(batch.lengths),
            block_m // group,
            programs_at_once(block_m, shape.head_dim, shape.num_kv_heads, chip(device)),
        )
        decode_rows = [row for row, length in enumerate(batch.lengths) if length == 1]
        rows, pieces = upload([np.array(decode_rows, np.int32), work.ravel()], device)
        counters = self._counters_of(max(len(decode_rows), num_shares), device)
        return _Plan(rows, counters, pieces.view(-1, 4), num_shares, block_m)

    def forward(self, q: torch.Tensor, layer: PagedLayer, batch: DeviceBatch) -> torch.Tensor:
        """See `PagedAttention.forward`."""
        plan: _Plan = batch.meta
        kv, index = batch.kv, layer.kv_index
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tensors = paged.Tensors(
            q,
            kv.key(index),
            kv.value(index),
            kv.key_scale(index),
            kv.value_scale(index),
            layer.sinks,
            batch.block_table,
            batch.rows,
            batch.query_start,
            batch.context_len,
        )
        scale, window, soft_cap = layer.scale, layer.window, layer.soft_cap
        if len(plan.decode_rows):
            splits = splits_of(
                len(plan.decode_rows),
                kv.num_kv_heads,
                batch.max_context_len,
                window,
                chip(q.device),
            )
            paged_decode(
                tensors,
                plan.decode_rows,
                plan.counters,
                out,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                splits=splits,
            )
        if plan.work is not None:
            paged_prefill(
                tensors,
                plan.work,
                plan.counters,
                out,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                block_m=plan.block_m,
                num_shares=plan.num_shares,
            )
        return out

    def capture(self, batch: DeviceBatch) -> _Plan:
        """All rows in their order; what they have to read, the kernels read on the device."""
        num_rows, device = len(batch.lengths), batch.input_ids.device
        if len(self._every_row) < num_rows or self._every_row.device != device:
            self._every_row = torch.arange(2 * num_rows, dtype=torch.int32, device=device)
        return _Plan(self._every_row[:num_rows], self._counters_of(num_rows, device))

    def refresh(self, batch: DeviceBatch, meta: _Plan) -> None:
        """Nothing: no number of an earlier step is in the plan."""

    def _counters_of(self, num_pairs: int, device: torch.device) -> torch.Tensor:
        """For each KV head so many, of rows or of shares."""
        needed = num_pairs * self._shape.num_kv_heads
        if len(self._counters) < needed or self._counters.device != device:
            self._counters = torch.zeros(2 * needed, dtype=torch.int32, device=device)
        return self._counters


def head_problems(shape: AttentionShape) -> list[str]:
    """Why no backend can compute such heads."""
    if shape.num_heads % shape.num_kv_heads == 0:
        return []
    return [f"`{shape.num_heads}` query heads cannot share `{shape.num_kv_heads}` KV heads"]


def available(
    shape: AttentionShape, kv_dtype: str, block_size: int, device: torch.device
) -> dict[str, list[str]]:
    """Every backend by name, the preferred one first, with the reasons why it cannot serve."""
    return {
        made.name: made.unsupported(shape, kv_dtype, block_size, device) for made in _all(shape)
    }


def choose(
    name: str, shape: AttentionShape, kv_dtype: str, block_size: int, device: torch.device
) -> PagedAttention:
    """The backend of that name; "auto": the first that can serve such a model there.

    Raises:
        ConfigError: there is none of that name, or it cannot; the message has the reasons.
    """
    backends = {made.name: made for made in _all(shape)}
    if name != "auto" and name not in backends:
        raise ConfigError(
            f"There is no attention backend `{name}`.",
            hint=f"Choose one of {_listed(['auto', *backends])}.",
        )
    why_not = []
    for made in backends.values():
        if name in ("auto", made.name):
            reasons = made.unsupported(shape, kv_dtype, block_size, device)
            if not reasons:
                return made
            why_not.append(f"`{made.name}` cannot compute attention here: {'; '.join(reasons)}.")
    raise ConfigError(" ".join(why_not), hint="`penstock doctor` lists every backend.")


def _all(shape: AttentionShape) -> list[PagedAttention]:
    from penstock.attention.flashinfer import FlashInferAttention  # it needs this module's types

    return [TritonAttention(shape), FlashInferAttention(shape)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""The batch that one step computes on torch, and the seam behind which attention is computed.

Owns `TorchBatch` (every tensor a leaf may read), `AttentionLayer` and the `AttentionBackend`
protocol. Knows no requests: a row of a batch is a run of tokens with a context, and nothing says
whether it is a prompt, a chunk of one or a single generated token.

Invariant: the batch is passed explicitly to everything; there is no global context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from penstock.attention.kv_store import KVStore


class AttentionLayer(NamedTuple):
    """What may differ from one attention layer of a model to the next."""

    kv_index: int  # which layer of the KV store is its own
    scale: float  # factor on the scores, usually head_dim ** -0.5


@dataclass(slots=True)
class TorchBatch:
    """One step for torch: T tokens in R rows, as `penstock.models.batch.ForwardBatch` has them.

    Row r holds the tokens [query_start[r], query_start[r + 1]) of the flat tensors. They are the
    last `lengths[r]` of the `context_lens[r]` tokens that its last query may see; the earlier ones
    are in the KV store already. Token i of a request lives in slot
    `block_table[r, i // block_size] * block_size + i % block_size`.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, index of the token in its request
    query_start: torch.Tensor  # [R + 1] int32
    context_len: torch.Tensor  # [R] int32, the tokens of this step included
    slot_mapping: torch.Tensor  # [T] int64, where the token's key and value are written
    block_table: torch.Tensor  # [R, M] int32; entries past the row's context are not read
    block_size: int  # tokens in a block
    kv: KVStore
    attention: AttentionBackend
    # What is known in Python anyway, so that planning need not read tensors back.
    lengths: list[int]  # [R] query tokens of the row, at least 1
    context_lens: list[int]  # [R] same as context_len
    meta: Any = None  # what `attention.plan(batch)` returned; only that backend reads it
    shared: dict[object, Any] = field(default_factory=dict)  # by leaf: computed once for all layers


class AttentionShape(Protocol):
    """What a backend must know of a model to say whether it can serve it."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class AttentionBackend(Protocol):
    """Causal attention over the paged KV store. Stateless: the plan travels in the batch."""

    @property
    def name(self) -> str:
        """How a user calls it."""

    def unsupported(self, shape: AttentionShape, kv_dtype: torch.dtype) -> list[str]:
        """Why this backend cannot serve such a model; empty if it can."""

    def plan(self, batch: TorchBatch) -> object:
        """Compute once a step what all layers share; the caller puts it into `batch.meta`."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: AttentionLayer,
        batch: TorchBatch,
    ) -> torch.Tensor:
        """Write k and v to the store, then attend: [T, H, D] from q [T, H, D], k, v [T, Hkv, D].

        A query sees the tokens of its row at its own position and before. Query head h reads KV
        head h // (H // Hkv). q and k carry their positions (RoPE) already. The three may be views
        of one tensor, contiguous in the last dimension only.
        """

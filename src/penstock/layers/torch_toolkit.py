"""The leaves of a model that torch computes.

Owns which leaf is which class, and the leaf in front of an attention backend. The values between
the leaves are torch tensors, their batch is a `TorchBatch`.

Invariant: a leaf holds no state from step to step; what layers share in one travels in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock.attention.base import AttentionLayer, TorchBatch
from penstock.layers import toolkit
from penstock.layers.embedding import Embedding, LMHead
from penstock.layers.linear import Linear
from penstock.layers.materials import Materials
from penstock.layers.norm import RMSNorm
from penstock.layers.rotary import Rotary
from penstock.layers.scaling import RopeScaling
from penstock.layers.toolkit import Part


class Attention:
    """One layer's attention, by the backend in the batch."""

    def __init__(
        self, layer: AttentionLayer, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        self._layer = layer
        self._first_key = num_heads
        self._first_value = num_heads + num_kv_heads
        self._head_dim = head_dim

    def __call__(self, qkv: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        """[T, H * D] of qkv [T, (H + 2 * Hkv) * D], which may have a dimension for the heads."""
        num_tokens = len(qkv)
        heads = qkv.view(num_tokens, -1, self._head_dim)
        out = batch.attention.forward(
            heads[:, : self._first_key],
            heads[:, self._first_key : self._first_value],
            heads[:, self._first_value :],
            self._layer,
            batch,
        )
        return out.reshape(num_tokens, -1)


@dataclass(frozen=True, slots=True)
class TorchToolkit:
    """Implements `Toolkit`."""

    materials: Materials

    def embedding(self, name: str, num_rows: int, size: int) -> Embedding:
        """A table [num_rows, size]."""
        return Embedding(name, num_rows, size, self.materials)

    def linear(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool = False,
        reduces: bool = False,
    ) -> Linear:
        """A map of `in_size` numbers."""
        return Linear(in_size, parts, bias=bias, gated=gated, materials=self.materials)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        """A norm over `size` numbers."""
        return RMSNorm(name, size, eps, self.materials)

    def rotary(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
    ) -> Rotary:
        """Rotation of the query and key heads."""
        return Rotary(num_heads + num_kv_heads, head_dim, theta, scaling, self.materials)

    def attention(
        self, kv_index: int, num_heads: int, num_kv_heads: int, head_dim: int, scale: float
    ) -> Attention:
        """Attention over layer `kv_index` of the KV store."""
        layer = AttentionLayer(kv_index, scale)
        return Attention(layer, num_heads, num_kv_heads, head_dim)

    def head(
        self, name: str, num_rows: int, size: int, tied_to: toolkit.Embedding | None
    ) -> LMHead:
        """A table [num_rows, size] of its own, or the embedding's."""
        assert tied_to is None or isinstance(tied_to, Embedding), "a leaf of another toolkit"
        return LMHead(name, num_rows, size, self.materials, tied_to=tied_to)

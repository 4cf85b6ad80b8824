"""Which models the triton backend computes, and what one rank has of such a model.

Owns the sentences that refuse and `Share`. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.layers import shards
from penstock.layers.specs import AttentionSpec, MLPSpec
from penstock.models.spec import ITEM_BYTES, ModelSpec


def why_not_on_device(spec: ModelSpec) -> str | None:
    """What the triton backend cannot compute of a model, as half a sentence; None: it can."""
    attentions = [layer.attention for layer in spec.layers]
    if not all(isinstance(attention, AttentionSpec) for attention in attentions):
        return "it has latent attention, for which the triton backend has no kernel yet"
    if not all(isinstance(layer.mlp, MLPSpec) for layer in spec.layers):
        return "it has a mixture of experts, for which the triton backend has no kernel yet"
    if spec.is_encoder:
        return "it is an encoder"
    if not spec.has_head:
        return "it has no scores of tokens"
    if len({(attention.num_heads, attention.cached) for attention in attentions}) > 1:
        return "its layers have heads of different numbers or sizes"
    return None


def why_not_shared(spec: ModelSpec, group_size: int) -> str | None:
    """Why `group_size` ranks cannot share a model that one can compute; None if they can."""
    if group_size == 1:
        return None
    attentions = (layer.attention for layer in spec.layers)
    if any(isinstance(one, AttentionSpec) and _norms_all_heads(one) for one in attentions):
        return "it norms the queries of all heads together, of which each rank has only some"
    return shards.problem(Share(spec), group_size)


def _norms_all_heads(spec: AttentionSpec) -> bool:
    return spec.qk_norm is not None and spec.qk_norm_over == "all"


@dataclass(frozen=True, slots=True)
class Share:
    """What the first of `group_size` ranks has of a model for which `why_not_on_device` is None.

    Implements `shards.Shape`: of one rank alone, what is to be shared.
    """

    spec: ModelSpec
    group_size: int = 1

    @property
    def vocab_size(self) -> int:
        """Rows of its tables."""
        return shards.vocabulary(self.spec.vocab_size, self.group_size, 0).num_rows

    @property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return self._heads.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values of each layer."""
        return self._heads.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.spec.head_dim

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return self.spec.num_layers

    @property
    def intermediate_size(self) -> int:
        """Rows of an MLP's map; of MLPs that differ, the greatest number that divides them."""
        mlps = [layer.mlp for layer in self.spec.layers]
        return math.gcd(*(mlp.size for mlp in mlps)) // self.group_size

    @property
    def _heads(self) -> shards.Heads:
        return shards.heads(self.spec.num_heads, self.spec.num_kv_heads, self.group_size)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token in the KV store; int8 and fp8 have a float32 scale for each vector."""
        is_scaled = dtype in {"int8", "fp8"}
        vector_bytes = self.head_dim + 4 if is_scaled else self.head_dim * ITEM_BYTES[dtype]
        return self.num_layers * 2 * self.num_kv_heads * vector_bytes

"""The leaves of a model that torch computes.

Owns which leaf is which class. The values between the leaves are torch tensors, their batch is a
`TorchBatch`.

Invariant: a leaf holds no state from step to step; what layers share in one travels in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock.layers import toolkit
from penstock.layers.embedding import Embedding, LMHead
from penstock.layers.experts import Experts
from penstock.layers.linear import Linear
from penstock.layers.materials import Materials
from penstock.layers.norm import Norm, SliceNorm
from penstock.layers.rotary import Rotary
from penstock.layers.specs import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    NormSpec,
    RopeSpec,
)
from penstock.layers.toolkit import ExpertNames, Part, PositionTable, RowMap
from penstock.layers.torch_attention import Attention, LatentAttention


@dataclass(frozen=True, slots=True)
class TorchToolkit:
    """Implements `Toolkit`."""

    materials: Materials

    def embedding(
        self,
        name: str,
        num_rows: int,
        size: int,
        *,
        scale: float = 1.0,
        positions: PositionTable | None = None,
    ) -> Embedding:
        """A table [num_rows, size]."""
        return Embedding(name, num_rows, size, self.materials, scale=scale, positions=positions)

    def linear(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool = False,
        activation: Activation | None = None,
        reduces: bool = False,
    ) -> Linear:
        """A map of `in_size` numbers."""
        return Linear(
            in_size,
            parts,
            bias=bias,
            gated=gated,
            activation=activation,
            materials=self.materials,
        )

    def norm(self, name: str, size: int, spec: NormSpec) -> Norm:
        """A norm over `size` numbers."""
        return Norm(name, size, spec, self.materials)

    def slice_norm(
        self,
        name: str,
        spec: NormSpec,
        *,
        first: int,
        num_runs: int,
        size: int,
        is_shared: bool = True,
        rows: RowMap | None = None,
    ) -> SliceNorm:
        """A norm of each of `num_runs` runs of `size` numbers."""
        return SliceNorm(
            name,
            spec,
            self.materials,
            first=first,
            num_runs=num_runs,
            size=size,
            is_shared=is_shared,
            rows=rows,
        )

    def rotary(
        self, spec: RopeSpec, *, first: int, num_heads: int, head_dim: int, offset: int = 0
    ) -> Rotary:
        """Rotation of some heads."""
        return Rotary(
            spec,
            self.materials,
            first=first,
            num_heads=num_heads,
            head_dim=head_dim,
            offset=offset,
        )

    def add(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale * x to the residual stream in place."""
        residual.add_(x, alpha=scale)

    def attention(self, kv_index: int, spec: AttentionSpec, sinks: str | None = None) -> Attention:
        """Attention over layer `kv_index` of the KV store."""
        return Attention(kv_index, spec, sinks, self.materials)

    def latent_attention(self, kv_index: int, spec: LatentSpec, name: str) -> LatentAttention:
        """Latent attention over layer `kv_index` of the KV store."""
        return LatentAttention(kv_index, spec, name, self.materials)

    def experts(self, in_size: int, spec: ExpertsSpec, names: ExpertNames) -> Experts:
        """A mixture of experts."""
        return Experts(in_size, spec, names, self.materials)

    def head(
        self,
        name: str,
        num_rows: int,
        size: int,
        tied_to: toolkit.Embedding | None,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> LMHead:
        """A table [num_rows, size] of its own, or the embedding's."""
        assert tied_to is None or isinstance(tied_to, Embedding), "a leaf of another toolkit"
        return LMHead(
            name,
            num_rows,
            size,
            self.materials,
            tied_to=tied_to,
            bias=bias,
            scale=scale,
            softcap=softcap,
        )

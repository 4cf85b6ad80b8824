"""The toolkit whose leaves record a program for the native library.

Owns which leaf is which class. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.layers import native_norms, toolkit
from penstock.layers.native_attention import Attention, LatentAttention
from penstock.layers.native_experts import Experts
from penstock.layers.native_linear import Linear
from penstock.layers.native_materials import NativeMaterials
from penstock.layers.native_norms import Norm, Rotary, SliceNorm
from penstock.layers.native_tables import Embedding, Head
from penstock.layers.specs import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    NormSpec,
    RopeSpec,
)
from penstock.layers.toolkit import ExpertNames, Part, PositionTable, RowMap
from penstock.native.program import Buffer


@dataclass(frozen=True, slots=True)
class NativeToolkit:
    """Implements `Toolkit`. Its leaves belong to one program."""

    materials: NativeMaterials

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

    def add(self, residual: Buffer, x: Buffer, scale: float = 1.0) -> None:
        """Add scale * x to the residual stream in place."""
        native_norms.add(self.materials.program, residual, x, scale)

    def attention(self, kv_index: int, spec: AttentionSpec, sinks: str | None = None) -> Attention:
        """Attention over layer `kv_index` of the KV memory."""
        return Attention(kv_index, spec, sinks, self.materials)

    def latent_attention(self, kv_index: int, spec: LatentSpec, name: str) -> LatentAttention:
        """Latent attention over layer `kv_index` of the KV memory."""
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
    ) -> Head:
        """A table [num_rows, size] of its own, or the embedding's."""
        assert tied_to is None or isinstance(tied_to, Embedding), "a leaf of another toolkit"
        return Head(
            name,
            num_rows,
            size,
            self.materials,
            tied_to=tied_to,
            bias=bias,
            scale=scale,
            softcap=softcap,
        )

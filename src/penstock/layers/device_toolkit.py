"""The toolkit whose leaves compute on a device, for one rank of a group.

Owns which leaf is which class. The values between the leaves are torch tensors, their batch is a
`DeviceBatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.attention.paged import PagedLayer
from penstock.layers import shards, toolkit
from penstock.layers.device_leaves import (
    Attention,
    DeviceMaterials,
    Embedding,
    Head,
    Linear,
    Norm,
    Rotary,
)
from penstock.layers.scaling import RopeScaling
from penstock.layers.toolkit import Part


@dataclass(frozen=True, slots=True)
class DeviceToolkit:
    """Implements `Toolkit`."""

    materials: DeviceMaterials

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
        """A map of `in_size` numbers, or this rank's share of it."""
        return Linear(
            in_size, parts, bias=bias, gated=gated, reduces=reduces, materials=self.materials
        )

    def norm(self, name: str, size: int, eps: float) -> Norm:
        """A norm over `size` numbers."""
        return Norm(name, size, eps, self.materials)

    def rotary(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
    ) -> Rotary:
        """Rotation of the query and key heads."""
        return Rotary(head_dim, theta, scaling, self.materials.device)

    def attention(
        self, kv_index: int, num_heads: int, num_kv_heads: int, head_dim: int, scale: float
    ) -> Attention:
        """Attention over layer `kv_index` of the pages, for this rank's heads."""
        heads = shards.heads(num_heads, num_kv_heads, self.materials.group.size)
        return Attention(PagedLayer(kv_index, scale), heads, head_dim)

    def head(self, name: str, num_rows: int, size: int, tied_to: toolkit.Embedding | None) -> Head:
        """A table [num_rows, size] of its own, or the embedding's."""
        assert tied_to is None or isinstance(tied_to, Embedding), "a leaf of another toolkit"
        return Head(name, num_rows, size, self.materials, tied_to=tied_to)

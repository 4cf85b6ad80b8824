"""The toolkit whose leaves record a program for the native library.

Owns which leaf is which class. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.layers import toolkit
from penstock.layers.native_leaves import (
    Attention,
    Embedding,
    Head,
    Linear,
    NativeMaterials,
    Norm,
    Rotary,
)
from penstock.layers.scaling import RopeScaling
from penstock.layers.toolkit import Part


@dataclass(frozen=True, slots=True)
class NativeToolkit:
    """Implements `Toolkit`. Its leaves belong to one program."""

    materials: NativeMaterials

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
        num_rotated = num_heads + num_kv_heads
        return Rotary(num_rotated, head_dim, theta, scaling, self.materials.program)

    def attention(
        self, kv_index: int, num_heads: int, num_kv_heads: int, head_dim: int, scale: float
    ) -> Attention:
        """Attention over layer `kv_index` of the KV memory."""
        return Attention(kv_index, num_heads, num_kv_heads, head_dim, scale, self.materials)

    def head(self, name: str, num_rows: int, size: int, tied_to: toolkit.Embedding | None) -> Head:
        """A table [num_rows, size] of its own, or the embedding's."""
        assert tied_to is None or isinstance(tied_to, Embedding), "a leaf of another toolkit"
        return Head(name, num_rows, size, self.materials, tied_to=tied_to)

"""The toolkit whose leaves compute on a device, for one rank of a group.

Owns which leaf is which class. The values between the leaves are torch tensors, their batch is a
`DeviceBatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from penstock.layers import toolkit
from penstock.layers.device_attention import (
    Attention,
    KernelRotary,
    TorchRotary,
    is_turned_by_kernel,
)
from penstock.layers.device_leaves import Embedding, Head, Linear
from penstock.layers.device_materials import DeviceMaterials
from penstock.layers.device_norms import Norm, SliceNorm
from penstock.layers.specs import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    NormSpec,
    RopeSpec,
)
from penstock.layers.toolkit import ExpertNames, Part, PositionTable, RowMap

_REFUSED = "`models.device_shapes` refuses such models"


@dataclass(frozen=True, slots=True)
class DeviceToolkit:
    """Implements `Toolkit` for the models that `models.device_shapes` does not refuse."""

    materials: DeviceMaterials

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
        assert positions is None or positions.types is None, _REFUSED
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
        """A map of `in_size` numbers, or this rank's share of it."""
        return Linear(
            in_size,
            parts,
            bias=bias,
            gated=gated,
            reduces=reduces,
            materials=self.materials,
            activation=activation,
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
    ) -> KernelRotary | TorchRotary:
        """Rotation of the query and key heads."""
        assert (first, offset) == (0, 0), _REFUSED
        device = self.materials.device
        if is_turned_by_kernel(spec, head_dim):
            return KernelRotary(spec, device)
        return TorchRotary(spec, head_dim, device)

    def add(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale * x to the residual stream in place."""
        residual.add_(x, alpha=scale)

    def attention(self, kv_index: int, spec: AttentionSpec, sinks: str | None = None) -> Attention:
        """Attention over layer `kv_index` of the pages, for this rank's heads."""
        return Attention(kv_index, spec, sinks, self.materials)

    def latent_attention(self, kv_index: int, spec: LatentSpec, name: str) -> NoReturn:
        """There is none yet."""
        raise AssertionError(_REFUSED)

    def experts(self, in_size: int, spec: ExpertsSpec, names: ExpertNames) -> NoReturn:
        """There is none yet."""
        raise AssertionError(_REFUSED)

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

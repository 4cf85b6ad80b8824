"""Rotary position embedding (Su et al. 2021).

Owns the frequencies. Knows no longest position: angles are computed for the positions of a step,
once a step, and wait in the batch for every layer.

Invariant: angles are fp32; only their sines and cosines take the model's format.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from penstock.attention.base import TorchBatch
from penstock.layers.materials import Materials
from penstock.layers.specs import RopeSpec


class RopeAngles(NamedTuple):
    """Cosines and signed sines of a step's positions, one for each half of what is rotated."""

    cos: torch.Tensor  # [T, 1, dim]
    sin: torch.Tensor  # [T, 1, dim], the first half negated


class Rotary:
    """Rotates halves in each head (the NeoX pairing: dimension i with i + dim / 2)."""

    def __init__(
        self,
        spec: RopeSpec,
        materials: Materials,
        *,
        first: int,
        num_heads: int,
        head_dim: int,
        offset: int,
    ) -> None:
        """See `Toolkit.rotary`."""
        half = torch.from_numpy(spec.frequencies())
        self._spec = spec
        self._frequencies = torch.cat((half, half)).to(materials.device)
        self._factors = torch.full((spec.dim,), spec.factor, device=materials.device)
        self._signs = self._factors.clone()
        self._signs[: spec.dim // 2] *= -1.0
        self._columns = slice(first, first + num_heads * head_dim)
        self._dims = slice(offset, offset + spec.dim)
        self._head_dim = head_dim
        self._dtype = materials.dtype

    def __call__(self, x: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        """Rotate heads of x [T, any] in place."""
        angles: RopeAngles | None = batch.shared.get(self._spec)
        if angles is None:
            angles = batch.shared[self._spec] = self._angles(batch.positions)
        heads = x[:, self._columns].view(len(x), -1, self._head_dim)
        rotated = heads[:, :, self._dims]
        turned = rotated.roll(self._spec.dim // 2, -1)
        rotated.mul_(angles.cos).addcmul_(turned, angles.sin)
        return x

    def _angles(self, positions: torch.Tensor) -> RopeAngles:
        """Angles of the positions [T], in the model's format."""
        angles = positions[:, None, None] * self._frequencies
        return RopeAngles(
            angles.cos().mul_(self._factors).to(self._dtype),
            angles.sin().mul_(self._signs).to(self._dtype),
        )

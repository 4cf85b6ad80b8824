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
from penstock.layers.scaling import RopeScaling, frequencies


class RopeAngles(NamedTuple):
    """Cosines and signed sines of a step's positions, one for each half of a head."""

    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor  # [T, 1, D], the first half negated


class Rotary:
    """Rotates the halves of each head (the NeoX pairing: dimension i with i + D / 2)."""

    def __init__(
        self,
        num_rotated: int,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
        materials: Materials,
    ) -> None:
        """Rotate the first `num_rotated` heads of whatever is given."""
        half = torch.from_numpy(frequencies(head_dim, theta, scaling))
        self._frequencies = torch.cat((half, half)).to(materials.device)
        self._signs = torch.ones(head_dim, device=materials.device)
        self._signs[: head_dim // 2] = -1.0
        self._num_rotated = num_rotated
        self._head_dim = head_dim
        self._dtype = materials.dtype

    def __call__(self, qkv: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        """Rotate the first heads of qkv [T, any * D] in place; [T, any, D] of the same memory.

        Query and key heads lie side by side, so that one call rotates both.
        """
        angles: RopeAngles | None = batch.shared.get(self)
        if angles is None:
            angles = batch.shared[self] = self._angles(batch.positions)
        heads = qkv.view(len(qkv), -1, self._head_dim)
        rotated = heads[:, : self._num_rotated]
        turned = rotated.roll(self._head_dim // 2, -1)
        rotated.mul_(angles.cos).addcmul_(turned, angles.sin)
        return heads

    def _angles(self, positions: torch.Tensor) -> RopeAngles:
        """Angles of the positions [T], in the model's format."""
        angles = positions[:, None, None] * self._frequencies
        return RopeAngles(
            angles.cos().to(self._dtype), angles.sin().mul_(self._signs).to(self._dtype)
        )

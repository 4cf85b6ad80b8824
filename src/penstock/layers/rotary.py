"""Rotary position embedding (Su et al. 2021).

Owns the frequencies. Knows no longest position: angles are computed for the positions of a step,
once a step, and passed to every layer.

Invariant: angles are fp32; only their sines and cosines take the model's format.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from penstock.layers.scaling import RopeScaling


class RopeAngles(NamedTuple):
    """Cosines and signed sines of a step's positions, one for each half of a head."""

    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor  # [T, 1, D], the first half negated


class Rotary:
    """Rotates the halves of each head (the NeoX pairing: dimension i with i + D / 2)."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is not None:
            frequencies = scaling.apply(frequencies)
        self._frequencies = torch.cat((frequencies, frequencies)).to(device)
        self._signs = torch.ones(head_dim, device=device)
        self._signs[: head_dim // 2] = -1.0
        self._half = head_dim // 2
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> RopeAngles:
        """Angles of the positions [T], in the model's format."""
        angles = positions[:, None, None] * self._frequencies
        return RopeAngles(
            angles.cos().to(self._dtype), angles.sin().mul_(self._signs).to(self._dtype)
        )

    def __call__(self, x: torch.Tensor, angles: RopeAngles) -> torch.Tensor:
        """Rotate the heads x [T, any, D]."""
        return torch.addcmul(x * angles.cos, x.roll(self._half, -1), angles.sin)

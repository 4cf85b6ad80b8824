"""Rotary position embedding (Su et al. 2021) and its scalings.

Owns the frequencies. Knows no longest position: angles are computed for the positions of a step,
once a step, and passed to every layer.

Invariant: angles are fp32; only their sines and cosines take the model's format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies are divided by `factor`, fast ones kept, those between are blended.

    Llama 3.1 (Dubey et al. 2024): a wave longer than original_context_len / low_freq_factor is
    slow, one shorter than original_context_len / high_freq_factor is fast.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_len: int

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Scale the frequencies [D / 2]."""
        wave_len = 2 * math.pi / frequencies
        smooth = (self.original_context_len / wave_len - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = smooth.clamp(0.0, 1.0)
        return frequencies * (smooth + (1.0 - smooth) / self.factor)


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al. 2023)."""

    factor: float

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Scale the frequencies [D / 2]."""
        return frequencies / self.factor


RopeScaling = Llama3Scaling | LinearScaling


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

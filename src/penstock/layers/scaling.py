"""RoPE's frequencies, and how they are stretched for contexts longer than those of training.

Imports no torch: every backend takes its frequencies from here, and a model's config is read, and
its memory planned, before torch is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


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

    def apply(self, frequencies: F32) -> F32:
        """Scale the frequencies [D / 2]."""
        wave_len = 2 * math.pi / frequencies
        smooth = (self.original_context_len / wave_len - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = smooth.clip(0, 1)
        return (frequencies * (smooth + (1 - smooth) / self.factor)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al. 2023)."""

    factor: float

    def apply(self, frequencies: F32) -> F32:
        """Scale the frequencies [D / 2]."""
        return (frequencies / self.factor).astype(np.float32)


RopeScaling = Llama3Scaling | LinearScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> F32:
    """Radians a position, [head_dim / 2]: 1 / theta ** (2 i / head_dim), scaled.

    Exponents, powers and their inverses are rounded to fp32, as where models are trained; the
    power itself is taken in fp64, so that no library's own rounding shows.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    return plain if scaling is None else scaling.apply(plain)

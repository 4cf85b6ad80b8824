"""How RoPE's frequencies are stretched for contexts longer than those of training.

Imports no torch: a model's config is read, and its memory planned, before torch is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

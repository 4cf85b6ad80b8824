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
    angle_factor = 1.0

    def apply(self, frequencies: F32, theta: float) -> F32:
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
    angle_factor = 1.0

    def apply(self, frequencies: F32, theta: float) -> F32:
        """Scale the frequencies [D / 2]."""
        return (frequencies / self.factor).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Slow frequencies are divided by `factor`, fast ones kept, by number and not by wave length.

    YaRN (Peng et al. 2023): a frequency is fast that turns `beta_fast` times within the original
    context, slow one that turns `beta_slow` times; those between are blended by their place in the
    row. `is_truncated` takes whole places as the bounds.
    """

    factor: float
    original_context_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    angle_factor: float = 1.0

    def apply(self, frequencies: F32, theta: float) -> F32:
        """Scale the frequencies [D / 2]."""
        size = len(frequencies)
        low, high = (
            self._place(turns, 2 * size, theta) for turns in (self.beta_fast, self.beta_slow)
        )
        if self.is_truncated:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * size - 1)
        width = high - low or 0.001
        slow = ((np.arange(size, dtype=np.float32) - low) / width).clip(0, 1)
        scaled: F32 = frequencies / self.factor * slow + frequencies * (1 - slow)
        return scaled.astype(np.float32)

    def _place(self, num_turns: float, dim: int, theta: float) -> float:
        """Where in the row the frequency is that turns so often within the original context."""
        turn_len = self.original_context_len / (num_turns * 2 * math.pi)
        return dim * math.log(turn_len) / (2 * math.log(theta))


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines with; `scale` is DeepSeek's `mscale`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """Each frequency is divided by a factor of its own (Ding et al. 2024, LongRoPE).

    A model has two sets of factors: one for texts within the original context, one for longer
    texts. Which set holds is fixed for a model, as in vLLM: the long one if its context is longer
    than the original. Keys that are in a cache cannot turn again when a text grows past the
    original length, which is when transformers would change the set.
    """

    factors: tuple[float, ...]  # [D / 2]
    angle_factor: float = 1.0

    def apply(self, frequencies: F32, theta: float) -> F32:
        """Scale the frequencies [D / 2]."""
        return (frequencies / np.array(self.factors, np.float32)).astype(np.float32)


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling | LongRopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> F32:
    """Radians a position, [head_dim / 2]: 1 / theta ** (2 i / head_dim), scaled.

    Exponents, powers and their inverses are rounded to fp32, as where models are trained; the
    power itself is taken in fp64, so that no library's own rounding shows.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    return plain if scaling is None else scaling.apply(plain, theta)

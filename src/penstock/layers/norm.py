"""Root mean square norm (Zhang and Sennrich 2019), alone or after a residual sum.

Owns its weight. Invariant: sums of squares are taken in fp32, whatever the format of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from penstock.layers.materials import Materials, weight
from penstock.layers.toolkit import Weight


class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Computed as x / hypot(|x|, sqrt(size * eps)) * (weight * sqrt(size)), which is the same and
    needs four calls into torch, where `functional.rms_norm` needs nine on CPU.
    """

    def __init__(self, name: str, size: int, eps: float, materials: Materials) -> None:
        self.name = name
        self.weight = materials.empty(size).fill_(1.0)
        self._eps = eps

    def weights(self) -> Iterator[Weight]:
        """The scale, [size]."""
        yield weight(f"{self.name}.weight", self.weight)

    def finish(self) -> None:
        """Fold the constant factors into the scale."""
        size = self.weight.numel()
        self._scale = self.weight.float() * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(size * self._eps), device=self.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Norm of x [..., size], in the format of x."""
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        return x.div(length.hypot_(self._floor)).mul_(self._scale).to(x.dtype)

    def add(self, residual: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """Add x, if any, to the residual stream in place and return the norm of the sum."""
        return self(residual if x is None else residual.add_(x))

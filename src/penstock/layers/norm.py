"""Norms in torch: of whole rows, alone or after a residual sum, and of runs within rows.

Owns their scales. Invariant: sums of squares are taken in fp32, whatever the format of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from penstock.layers.materials import Materials, weight
from penstock.layers.specs import NormSpec
from penstock.layers.toolkit import RowMap, Weight

Normed = Callable[[torch.Tensor], torch.Tensor]


class Norm:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, or LayerNorm.

    The first is computed as x / hypot(|x|, sqrt(size * eps)) * (scale * sqrt(size)), which is the
    same and needs four calls into torch, where `functional.rms_norm` needs nine on CPU.
    """

    def __init__(self, name: str, size: int, spec: NormSpec, materials: Materials) -> None:
        self.name = name
        self.weight = materials.empty(size).fill_(1.0 - spec.offset)
        self.bias = materials.empty(size).zero_() if spec.has_bias else None
        self._spec = spec

    def weights(self) -> Iterator[Weight]:
        """The scale, [size], and perhaps a bias."""
        if self._spec.has_scale:
            yield weight(f"{self.name}.weight", self.weight)
        if self.bias is not None:
            yield weight(f"{self.name}.bias", self.bias)

    def finish(self) -> None:
        """Derive what the norm multiplies with."""
        self._norm = normed(self._spec, self.weight, self.weight.numel(), self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Norm of x [..., size], in the format of x."""
        return self._norm(x)

    def add(
        self, residual: torch.Tensor, x: torch.Tensor | None, scale: float = 1.0
    ) -> torch.Tensor:
        """Add scale * x, if any, to the residual stream in place; the norm of the sum."""
        return self._norm(residual if x is None else residual.add_(x, alpha=scale))

    def renew(self, residual: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """The norm of the sum, as a new residual stream."""
        return self._norm(residual if x is None else residual.add_(x))


class SliceNorm:
    """Norms of runs of each row's numbers, in place."""

    def __init__(
        self,
        name: str,
        spec: NormSpec,
        materials: Materials,
        *,
        first: int,
        num_runs: int,
        size: int,
        is_shared: bool,
        rows: RowMap | None,
    ) -> None:
        self.name = name
        self._spec = spec
        self._columns = slice(first, first + num_runs * size)
        self._size = size
        self._rows = rows
        self.weight = materials.empty(size if is_shared else num_runs * size)
        self.weight.fill_(1.0 - spec.offset)

    def weights(self) -> Iterator[Weight]:
        """The scales, flat."""
        yield weight(f"{self.name}.weight", self.weight, rows=self._rows)

    def finish(self) -> None:
        """Derive what the norm multiplies with."""
        self._norm = normed(self._spec, self.weight.view(-1, self._size), self._size, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, any] with its runs normed."""
        runs = x[:, self._columns].view(len(x), -1, self._size)
        runs.copy_(self._norm(runs))
        return x


def normed(spec: NormSpec, weight: torch.Tensor, size: int, bias: torch.Tensor | None) -> Normed:
    """A function that norms the last dimension, of `size` numbers."""
    scale = weight.float() + spec.offset
    if spec.kind == "layer":
        shift = None if bias is None else bias.float()

        def layer_norm(x: torch.Tensor) -> torch.Tensor:
            y = functional.layer_norm(x.float(), (size,), eps=spec.eps).mul_(scale)
            return (y if shift is None else y.add_(shift)).to(x.dtype)

        return layer_norm
    scale *= math.sqrt(size)
    floor = torch.tensor(math.sqrt(size * spec.eps), device=weight.device)

    def rms_norm(x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        return x.div(length.hypot_(floor)).mul_(scale).to(x.dtype)

    return rms_norm

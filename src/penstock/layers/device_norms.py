"""Norms on a device: of whole rows, by the kernel where there is one, and of runs within rows.

Owns their scales. Every rank has those of whole rows. Invariant: sums of squares are taken in
float32, and where a checkpoint's scale is less than what is multiplied (`NormSpec.offset`), the sum
is float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from penstock.kernels.add_rms_norm import add_rms_norm
from penstock.layers.device_materials import DeviceMaterials, Taken, put
from penstock.layers.specs import NormSpec
from penstock.layers.toolkit import RowMap, Weight


class Norm:
    """Norm of a residual sum, by the root mean square in one kernel, or LayerNorm in torch."""

    def __init__(self, name: str, size: int, spec: NormSpec, materials: DeviceMaterials) -> None:
        assert spec.kind == "layer" or not spec.has_bias, "a bias belongs to LayerNorm"
        self.name = name
        self._spec = spec
        self._size = size
        self._device = materials.device
        is_wide = spec.offset != 0.0
        self.weight: torch.Tensor | None = None
        if spec.has_scale or spec.kind == "rms":  # the kernel multiplies with ones, if need be
            self.weight = materials.vector(size, 1.0 - spec.offset, is_wide=is_wide)
        self.bias = materials.vector(size, 0.0, is_wide=is_wide) if spec.has_bias else None
        self._dtype = torch.float32 if is_wide else materials.dtype

    def weights(self) -> Iterator[Weight]:
        """The scale, [size], and perhaps a bias."""
        if self._spec.has_scale and self.weight is not None:
            yield self._weight("weight", self.weight)
        if self.bias is not None:
            yield self._weight("bias", self.bias)

    def _weight(self, name: str, vector: torch.Tensor) -> Weight:
        taken = Taken((slice(None),), partial(put, vector), self._device)
        return Weight(f"{self.name}.{name}", (self._size,), taken)

    def finish(self) -> None:
        """Derive what the norm multiplies with."""
        if self.weight is not None and self._spec.offset:
            self.weight += self._spec.offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [T, size]."""
        if self._spec.kind == "rms":
            assert self.weight is not None
            return add_rms_norm(None, x, self.weight, self._spec.eps)
        normed = functional.layer_norm(
            x.to(self._dtype), (self._size,), self.weight, self.bias, self._spec.eps
        )
        return normed.to(x.dtype)

    def add(
        self, residual: torch.Tensor, x: torch.Tensor | None, scale: float = 1.0
    ) -> torch.Tensor:
        """Add scale * x, if any, to the residual stream in place and return the norm of the sum."""
        if self._spec.kind == "rms" and scale == 1.0:
            assert self.weight is not None
            return add_rms_norm(x, residual, self.weight, self._spec.eps)
        if x is not None:
            residual.add_(x, alpha=scale)
        return self(residual)

    def renew(self, residual: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """The norm of the sum, as a new residual stream."""
        return self.add(residual, x)


class SliceNorm:
    """Norms of runs of each row's numbers, in place: of the heads that a rank has."""

    def __init__(
        self,
        name: str,
        spec: NormSpec,
        materials: DeviceMaterials,
        *,
        first: int,
        num_runs: int,
        size: int,
        is_shared: bool,
        rows: RowMap | None,
    ) -> None:
        assert not spec.has_bias, "runs are normed without a bias"
        self.name = name
        self._spec = spec
        self._size = size
        self._rows = rows
        self._by_kernel = spec.kind == "rms" and is_shared
        # Queries come first and are shared evenly; keys behind them are, or are held by several.
        group = materials.group
        self._num_own = num_own = max(num_runs // group.size, 1)
        first //= group.size
        self._columns = slice(first, first + num_own * size)
        self._num_scales = size if is_shared else num_runs * size
        own = slice(0, size)
        if not is_shared:
            start = group.rank * num_runs // group.size * size
            own = slice(start, start + num_own * size)
        self.weight = materials.vector(own.stop - own.start, 1.0 - spec.offset, is_wide=True)
        self._taken = Taken((own,), partial(put, self.weight), materials.device)

    def weights(self) -> Iterator[Weight]:
        """The scales, flat."""
        if self._spec.has_scale:
            name, shape = f"{self.name}.weight", (self._num_scales,)
            yield Weight(name, shape, self._taken, rows=self._rows)

    def finish(self) -> None:
        """Derive what the norm multiplies with."""
        self.weight += self._spec.offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, any] with its runs normed."""
        runs = x[:, self._columns].view(len(x), self._num_own, self._size)
        if self._by_kernel:
            flat = runs.reshape(-1, self._size)  # rows of their own, which is what the kernel takes
            normed = add_rms_norm(None, flat, self.weight, self._spec.eps)
            runs.copy_(normed.view(runs.shape))
            return x
        wide = runs.float()
        if self._spec.kind == "layer":
            wide = functional.layer_norm(wide, (self._size,), eps=self._spec.eps)
        else:
            wide = wide * wide.square().mean(-1, keepdim=True).add_(self._spec.eps).rsqrt_()
        runs.copy_(wide.mul_(self.weight.view(-1, self._size)))
        return x

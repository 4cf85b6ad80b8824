"""Norms, rotary positions and sums that the native library computes.

Owns the scales of norms and the frequencies of rotations. Norms and rotations of a part of each row
happen in place.

Invariant: the residual stream is float32, and so is every sum of squares; the angles of equal
rotations are computed once a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from penstock.layers.native_materials import NativeMaterials, vector_weight
from penstock.layers.specs import NormSpec, RopeSpec
from penstock.layers.toolkit import Batch, RowMap, Weight
from penstock.native.program import Buffer, Program
from penstock.native.structs import (
    AddArgs,
    AnglesArgs,
    NormArgs,
    NormKind,
    OpKind,
    RopeArgs,
    SliceNormArgs,
)

_KINDS = {"rms": NormKind.RMS_NORM, "layer": NormKind.LAYER_NORM}


class Scale:
    """What a norm multiplies with, [size]: the spec's offset and what is loaded."""

    def __init__(self, size: int, spec: NormSpec, materials: NativeMaterials) -> None:
        self.loaded = np.full(size, 1.0 - spec.offset, np.float32)
        self._offset = np.float32(spec.offset)
        self._vector = materials.vector(size)

    def finish(self) -> None:
        """Put the numbers among the weights."""
        self._vector.values[:] = self.loaded + self._offset

    @property
    def address(self) -> int:
        """Where they are then."""
        return int(self._vector.values.ctypes.data)


class Norm:
    """A norm of whole rows. It may be called many times."""

    def __init__(self, name: str, size: int, spec: NormSpec, materials: NativeMaterials) -> None:
        self.name = name
        self._spec = spec
        self._size = size
        self._materials = materials
        self._scale = Scale(size, spec, materials) if spec.has_scale else None
        self._bias = materials.vector(size) if spec.has_bias else None

    def weights(self) -> Iterator[Weight]:
        """The scale, [size], and a bias, if there are any."""
        if self._scale is not None:
            yield vector_weight(f"{self.name}.weight", self._scale.loaded, self._size)
        if self._bias is not None:
            yield vector_weight(f"{self.name}.bias", self._bias.values, self._size)

    def finish(self) -> None:
        """Put the scale among the weights."""
        if self._scale is not None:
            self._scale.finish()

    def __call__(self, x: Buffer) -> Buffer:
        """The norm of x [T, size], in the model's format."""
        out = self._materials.value(self._size)
        self._materials.program.append(OpKind.NORM, self._args(x, out), x=x, out=out)
        return out

    def add(self, residual: Buffer, x: Buffer | None, scale: float = 1.0) -> Buffer:
        """Add scale * x, if any, to the residual stream in place; the norm of the sum."""
        return self._of_sum(residual, x, scale, self._materials.dtype)

    def renew(self, residual: Buffer, x: Buffer | None) -> Buffer:
        """The norm of the residual stream plus x, if any, as a new residual stream."""
        return self._of_sum(residual, x, 1.0, "float32")

    def _of_sum(self, residual: Buffer, x: Buffer | None, scale: float, dtype: str) -> Buffer:
        program = self._materials.program
        out = program.value(self._size, dtype)
        args = self._args(out if x is None else x, out)
        args.residual_stride, args.x_scale = residual.width, scale
        values = {"residual": residual, "out": out} | ({} if x is None else {"x": x})
        program.append(OpKind.NORM, args, **values)
        return out

    def _args(self, x: Buffer, out: Buffer) -> NormArgs:
        return NormArgs(
            x_stride=x.width,
            weight=None if self._scale is None else self._scale.address,
            bias=None if self._bias is None else self._bias.values.ctypes.data,
            out_stride=out.width,
            size=self._size,
            eps=self._spec.eps,
            x_scale=1.0,
            kind=_KINDS[self._spec.kind],
            dtype=x.dtype_id,
            out_dtype=out.dtype_id,
        )


class SliceNorm:
    """Norms of runs of each row's numbers, in place."""

    def __init__(
        self,
        name: str,
        spec: NormSpec,
        materials: NativeMaterials,
        *,
        first: int,
        num_runs: int,
        size: int,
        is_shared: bool,
        rows: RowMap | None,
    ) -> None:
        self.name = name
        self._spec = spec
        self._first, self._num_runs, self._size = first, num_runs, size
        self._is_shared = is_shared
        self._rows = rows
        self._program = materials.program
        count = size if is_shared else num_runs * size
        self._scale = Scale(count, spec, materials) if spec.has_scale else None

    def weights(self) -> Iterator[Weight]:
        """The scales, flat, if there are any."""
        if self._scale is not None:
            loaded = self._scale.loaded
            yield vector_weight(f"{self.name}.weight", loaded, len(loaded), rows=self._rows)

    def finish(self) -> None:
        """Put the scales among the weights."""
        if self._scale is not None:
            self._scale.finish()

    def __call__(self, x: Buffer) -> Buffer:
        """x [T, any] with its runs normed."""
        args = SliceNormArgs(
            stride=x.width,
            first=self._first,
            num_runs=self._num_runs,
            size=self._size,
            weight=None if self._scale is None else self._scale.address,
            weight_stride=0 if self._is_shared else self._size,
            eps=self._spec.eps,
            kind=_KINDS[self._spec.kind],
            dtype=x.dtype_id,
        )
        self._program.append(OpKind.SLICE_NORM, args, x=x)
        return x


class Rotary:
    """Rotates some heads of whatever is given."""

    def __init__(
        self,
        spec: RopeSpec,
        materials: NativeMaterials,
        *,
        first: int,
        num_heads: int,
        head_dim: int,
        offset: int,
    ) -> None:
        self._spec = spec
        self._frequencies = np.ascontiguousarray(spec.frequencies(), np.float32)
        self._first = first + offset
        self._num_heads, self._head_dim = num_heads, head_dim
        self._materials = materials

    def __call__(self, x: Buffer, batch: Batch) -> Buffer:
        """Rotate heads of x [T, any] in place."""
        args = RopeArgs(
            stride=x.width,
            half=len(self._frequencies),
            first=self._first,
            head_stride=self._head_dim,
            num_heads=self._num_heads,
            dtype=x.dtype_id,
        )
        self._materials.program.append(OpKind.ROPE, args, angles=self._angles(), x=x)
        return x

    def _angles(self) -> Buffer:
        """Those of the step's positions, which all rotations of this spec read."""
        materials = self._materials
        found = materials.angles.get(self._spec)
        if found is None:
            half = len(self._frequencies)
            found = materials.program.value(2 * half, "float32")
            args = AnglesArgs(
                frequencies=self._frequencies.ctypes.data, half=half, scale=self._spec.factor
            )
            materials.program.append(OpKind.ANGLES, args, out=found)
            materials.angles[self._spec] = found
        return found


def add(program: Program, residual: Buffer, x: Buffer, scale: float) -> None:
    """Add scale * x to the residual stream in place."""
    args = AddArgs(
        residual_stride=residual.width,
        x_stride=x.width,
        size=residual.width,
        scale=scale,
        dtype=x.dtype_id,
    )
    program.append(OpKind.ADD, args, residual=residual, x=x)

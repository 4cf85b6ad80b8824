"""Linear maps that the native library computes.

Owns how the rows of a checkpoint's maps lie in packed matrices. A leaf that is called appends ops
to a program; the values between leaves are `Buffer`s, and no leaf looks at the batch: ops read the
step.

Invariant: rows that are joined for one op have one format; where a checkpoint's differ, there are
as many ops as pieces, and they write to columns of one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from penstock.layers.native_materials import (
    Matrix,
    NativeMaterials,
    matrix_weight,
    vector_weight,
)
from penstock.layers.specs import Activation
from penstock.layers.toolkit import Part, Weight
from penstock.native import structs
from penstock.native.program import Buffer
from penstock.native.structs import Epilogue, LinearArgs, OpKind
from penstock.native.weights import PANEL_ROWS, Placement, padded_rows
from penstock.quantization.placing import Piece


def activation_id(activation: Activation | None) -> structs.Activation:
    """As the library has it."""
    if activation is None:
        return structs.Activation.IDENTITY
    return structs.Activation[activation.upper()]


def product_args(
    materials: NativeMaterials, weight: Matrix, x: Buffer, y: Buffer, num_outputs: int
) -> LinearArgs:
    """y = x W^T for the rows of `y`, and nothing behind it."""
    return LinearArgs(
        weight=weight.packed.struct,
        x_stride=x.width,
        y_stride=y.width,
        num_groups=1,
        x_dtype=x.dtype_id,
        y_dtype=y.dtype_id,
        rows=y.rows,
        epilogue=Epilogue.STORE,
        activation=structs.Activation.IDENTITY,
        activation_bits=materials.bits_beside(weight.form),
        num_outputs=num_outputs,
        y_scale=1.0,
    )


class _Joined:
    """Some parts in one matrix, one after the other; gate and up in turns, a panel of each."""

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        piece: Piece,
        *,
        bias: bool,
        gated: bool,
        materials: NativeMaterials,
    ) -> None:
        self.num_outputs = parts[0].num_rows if gated else piece.num_rows
        self._parts: list[tuple[Part, Placement]] = []
        first = 0
        for part in parts:
            self._parts.append((part, Placement(first, 2 if gated else 1)))
            first += PANEL_ROWS if gated else part.num_rows
        num_rows = 2 * padded_rows(self.num_outputs) if gated else first
        self.weight = materials.matrix(piece.form, num_rows, in_size)
        self.bias = materials.vector(padded_rows(num_rows)) if bias else None

    def weights(self) -> Iterator[Weight]:
        """Weight and bias of every part."""
        for part, placement in self._parts:
            count = part.num_rows
            yield matrix_weight(f"{part.name}.weight", self.weight, count, placement, part.rows)
            if self.bias is not None:
                values = self.bias.values
                yield vector_weight(f"{part.name}.bias", values, count, placement, part.rows)


class Linear:
    """y = x W^T + b, where the rows of W are those of its parts, then an activation."""

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool,
        activation: Activation | None,
        materials: NativeMaterials,
    ) -> None:
        assert not gated or (len(parts) == 2 and parts[0].num_rows == parts[1].num_rows)
        named = [(f"{part.name}.weight", part.num_rows) for part in parts]
        self._pieces = [
            _Joined(
                in_size,
                parts[piece.first_part : piece.first_part + piece.num_parts],
                piece,
                bias=bias,
                gated=gated,
                materials=materials,
            )
            for piece in materials.formats.linear(named, in_size, is_gated=gated)
        ]
        self._gated = gated
        self._activation = activation
        self._materials = materials

    def weights(self) -> Iterator[Weight]:
        """Weight and bias of every part."""
        for piece in self._pieces:
            yield from piece.weights()

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, x: Buffer) -> Buffer:
        """Map x [T, in] to [T, out]; gated: to [T, out / 2]."""
        materials = self._materials
        y = materials.value(sum(piece.num_outputs for piece in self._pieces))
        first = 0
        for piece in self._pieces:
            args = product_args(materials, piece.weight, x, y, piece.num_outputs)
            args.epilogue = Epilogue.GATED if self._gated else Epilogue.STORE
            args.activation = activation_id(self._activation)
            if piece.bias is not None:
                args.bias = piece.bias.values.ctypes.data
            materials.program.append(OpKind.LINEAR, args, x=x, y=y.columns(first))
            first += piece.num_outputs
        return y

"""From token ids to vectors and from vectors to logits, by the native library.

Owns the two tables, which are one if the model ties them, and learned positions.
Invariant: the residual stream and logits are float32; a tied table is held once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from penstock.layers.native_linear import product_args
from penstock.layers.native_materials import (
    F32,
    NativeMaterials,
    matrix_weight,
    numbers,
    vector_weight,
)
from penstock.layers.toolkit import Batch, PositionTable, Stored, Weight
from penstock.native.program import Buffer
from penstock.native.structs import EmbedArgs, OpKind, Rows
from penstock.native.weights import padded_rows


class Embedding:
    """One vector for each token id, out of a packed table, and perhaps one for its position."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: NativeMaterials,
        *,
        scale: float,
        positions: PositionTable | None,
    ) -> None:
        self.name = name
        form = materials.formats.table(f"{name}.weight", num_rows, size)
        self.table = materials.matrix(form, num_rows, size)
        self._program = materials.program
        self._scale = scale
        self._positions = positions
        if positions is not None:
            # What every token of a type gets beside its position's vector is added when all is
            # loaded: a copy of the positions for each type.
            self._rows = materials.vector(max(positions.num_types, 1) * positions.num_rows * size)
            self._loaded = np.zeros((positions.num_rows, size), np.float32)
            self._types = np.zeros((positions.num_types, size), np.float32)

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size], and those of positions and of kinds of tokens."""
        yield matrix_weight(f"{self.name}.weight", self.table, self.table.num_rows)
        positions = self._positions
        if positions is not None:
            name, table = f"{positions.name}.weight", self._loaded
            yield Weight(name, table.shape, partial(_take, table))
            if positions.types is not None:
                name, table = f"{positions.types}.weight", self._types
                yield Weight(name, table.shape, partial(_take, table))

    def finish(self) -> None:
        """Put the vectors of positions among the weights."""
        positions = self._positions
        if positions is not None:
            if positions.types is not None:
                self._loaded = self._types[:, None] + self._loaded
            self._rows.values[:] = self._loaded.reshape(-1)
            del self._loaded, self._types

    def __call__(self, batch: Batch) -> Buffer:
        """Vectors [T, size] of the step's ids."""
        size, positions = self.table.num_columns, self._positions
        out = self._program.value(size, "float32")
        args = EmbedArgs(table=self.table.packed.struct, out_stride=size, scale=self._scale)
        if positions is not None:
            args.positions = self._rows.values[positions.first_row * size :].ctypes.data
            num_rows = max(positions.num_types, 1) * positions.num_rows
            args.num_positions = num_rows - positions.first_row
        self._program.append(OpKind.EMBED, args, out=out)
        return out


class Head:
    """Scores of all token ids, for the rows of a step that want logits."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: NativeMaterials,
        *,
        tied_to: Embedding | None,
        bias: bool,
        scale: float,
        softcap: float,
    ) -> None:
        self.name = name
        self._materials = materials
        self._tied_to = tied_to
        if tied_to is None:
            form = materials.formats.table(f"{name}.weight", num_rows, size)
            self.table = materials.matrix(form, num_rows, size)
        else:
            self.table = tied_to.table
        self._bias = materials.vector(padded_rows(num_rows)) if bias else None
        self._scale = scale
        self._softcap = softcap

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one. Perhaps a bias."""
        duplicate_of = None if self._tied_to is None else f"{self._tied_to.name}.weight"
        num_rows = self.table.num_rows
        yield matrix_weight(f"{self.name}.weight", self.table, num_rows, duplicate_of=duplicate_of)
        if self._bias is not None:
            yield vector_weight(f"{self.name}.bias", self._bias.values, num_rows)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, hidden: Buffer) -> Buffer:
        """Logits [L, V], float32, of the step's logit rows of hidden [T, size]."""
        program = self._materials.program
        logits = program.value(self.table.num_rows, "float32", Rows.LOGITS)
        args = product_args(self._materials, self.table, hidden, logits, logits.width)
        args.y_scale, args.softcap = self._scale, self._softcap
        if self._bias is not None:
            args.bias = self._bias.values.ctypes.data
        program.append(OpKind.LINEAR, args, x=hidden, y=logits)
        return logits


def _take(table: F32, stored: Stored) -> None:
    table[:] = numbers(stored)

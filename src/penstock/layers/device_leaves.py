"""The maps and tables of a model on a device: torch tensors, our kernels, a share for each rank.

Owns what these leaves hold of the weights and which operations they call. Knows neither files nor
requests.

Invariant: no leaf waits for the device, so that a forward pass can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.nn import functional

from penstock.attention.paged import DeviceBatch
from penstock.kernels import gated as gated_kernel
from penstock.layers import shards
from penstock.layers.device_materials import DeviceMaterials, Taken, fill, put
from penstock.layers.linear import ACTIVATIONS, gate
from penstock.layers.specs import Activation
from penstock.layers.toolkit import Part, PositionTable, Weight
from penstock.quantization.device import DeviceWeight


class Embedding:
    """One vector for each token id, and perhaps one for its position.

    A rank has the vectors of its share of the ids, and all positions.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: DeviceMaterials,
        *,
        scale: float = 1.0,
        positions: PositionTable | None = None,
    ) -> None:
        self.name = name
        self.table, self._weight, self.ids = _table(name, num_rows, size, materials)
        self._group = materials.group
        self._scale = scale
        self._first_position = 0
        self._positions: torch.Tensor | None = None
        if positions is not None:
            self._first_position = positions.first_row
            shape = positions.num_rows, size
            device = materials.device
            self._positions = torch.zeros(shape, dtype=materials.dtype, device=device)
            taken = Taken((slice(None),), partial(put, self._positions), device)
            self._of_positions = Weight(f"{positions.name}.weight", shape, taken)

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size], and that of positions."""
        yield self._weight
        if self._positions is not None:
            yield self._of_positions

    def finish(self) -> None:
        """Derive what the products read."""
        self.table.finish()

    def __call__(self, batch: DeviceBatch) -> torch.Tensor:
        """Vectors [T, size] of the batch's ids: a new tensor, which the caller may change."""
        vectors = self._of_ids(batch.input_ids)
        if self._scale != 1.0:
            vectors *= self._scale
        if self._positions is not None:
            rows = (batch.positions + self._first_position).clamp_(max=len(self._positions) - 1)
            vectors += functional.embedding(rows, self._positions)
        return vectors

    def _of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return self.table.rows(ids)
        ids = ids - self.ids.start
        is_here = (ids >= 0) & (ids < self.ids.stop - self.ids.start)
        vectors = self.table.rows(ids * is_here) * is_here[:, None]
        return self._group.all_reduce(vectors)


class Linear:
    """y = x W^T + b, where the rows of W are this rank's of each part, one part after the other.

    One that `reduces` has this rank's columns of all rows: what it returns is summed over the
    ranks, the bias once. A gated one returns activation(gate) * up.
    """

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool,
        reduces: bool,
        materials: DeviceMaterials,
        activation: Activation | None = None,
    ) -> None:
        group = materials.group
        self._in_size = in_size
        self._parts = parts
        self._gated = gated
        self._activation = activation
        self._reduces = reduces and group.size > 1
        self._group = group
        self._device = materials.device
        if self._reduces:
            self._columns = shards.column_range(in_size, group.size, group.rank)
            self._rows = [slice(0, part.num_rows) for part in parts]
        else:
            self._columns = slice(0, in_size)
            self._rows = [shards.part_rows(part, group.size, group.rank) for part in parts]
        num_rows = sum(map(_length, self._rows))
        self.weight = materials.matrix(materials.scheme.linear, num_rows, _length(self._columns))
        self.bias = materials.vector(num_rows, 0.0) if bias else None

    def weights(self) -> Iterator[Weight]:
        """Weight and bias of every part."""
        first = 0
        for part, rows in zip(self._parts, self._rows, strict=True):
            share = rows, self._columns
            taken = Taken(share, partial(fill, self.weight, first), self._device)
            shape = part.num_rows, self._in_size
            yield Weight(f"{part.name}.weight", shape, taken, rows=part.rows)
            if self.bias is not None:
                own = self.bias[first : first + _length(rows)]
                taken = Taken((rows,), partial(put, own), self._device)
                yield Weight(f"{part.name}.bias", (part.num_rows,), taken, rows=part.rows)
            first += _length(rows)

    def finish(self) -> None:
        """Derive what the products read, and compile them."""
        self.weight.finish()
        if self._reduces and self._group.rank > 0:
            self.bias = None  # the first rank adds it
        self.weight.warm_up(self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, in] to [T, out]; gated: to [T, out / 2]."""
        y = self.weight(x, self.bias)
        if self._activation is None:
            return self._group.all_reduce(y) if self._reduces else y
        if not self._gated:
            return ACTIVATIONS[self._activation](y)
        if self._activation in gated_kernel.ACTIVATIONS:
            return gated_kernel.gated(y, self._activation)
        return gate(y, self._activation)


class Head:
    """Scores of all token ids, in the model's dtype; a rank multiplies its share of the table."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: DeviceMaterials,
        *,
        tied_to: Embedding | None = None,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        self.name = name
        self._group = materials.group
        self._num_rows = num_rows
        self._tied_to = tied_to
        self._scale = scale
        self._softcap = softcap
        if tied_to is None:
            self.table, self._weight, self._ids = _table(name, num_rows, size, materials)
        else:
            self.table, self._ids = tied_to.table, tied_to.ids
            original = next(tied_to.weights())
            self._weight = original._replace(name=f"{name}.weight", duplicate_of=original.name)
        self._device = materials.device
        self.bias = materials.vector(self.table.num_rows, 0.0) if bias else None

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one. Perhaps a bias."""
        yield self._weight
        if self.bias is not None:
            taken = Taken((self._ids,), partial(put, self.bias), self._device)
            yield Weight(f"{self.name}.bias", (self._num_rows,), taken)

    def finish(self) -> None:
        """Derive what the products read, unless the embedding does, and compile them."""
        if self._tied_to is None:
            self.table.finish()
        self.table.warm_up(self.bias)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of hidden [L, size], on every rank; rows may be padded in memory."""
        logits = self.table(hidden, self.bias)
        if self._scale != 1.0:
            logits *= self._scale
        if self._softcap:
            logits = logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._group.size == 1:
            return logits
        return self._group.all_gather(logits)[:, : self._num_rows]


def _table(
    name: str, num_rows: int, size: int, materials: DeviceMaterials
) -> tuple[DeviceWeight, Weight, slice]:
    """A table by token id: this rank's share, what fills it, and its ids."""
    group = materials.group
    ids, num_padded = shards.vocabulary(num_rows, group.size, group.rank)
    table = materials.matrix(materials.scheme.table, num_padded, size)
    taken = Taken((ids, slice(None)), partial(fill, table, 0), materials.device)
    return table, Weight(f"{name}.weight", (num_rows, size), taken), ids


def _length(share: slice) -> int:
    length: int = share.stop - share.start
    return length

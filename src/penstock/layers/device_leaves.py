"""The leaves of a model on a device: torch tensors, our kernels, and a share for each rank.

Owns what a leaf holds of the weights and which operations it calls. Knows neither files nor
requests; how a matrix is stored is `quantization.device`'s business, which part of it a rank has is
`layers.shards`'.

Invariant: a stored tensor goes straight from the mapped file into its place on the device, and no
leaf waits for the device, so that a forward pass can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from penstock.attention.paged import DeviceBatch, PagedLayer
from penstock.errors import EngineError, ModelLoadError
from penstock.kernels.add_rms_norm import add_rms_norm
from penstock.kernels.gated import gated as gated_product
from penstock.kernels.rope_store import rope_store
from penstock.layers import shards
from penstock.layers.scaling import RopeScaling, frequencies
from penstock.layers.toolkit import Part, StoredTensor, Weight
from penstock.parallel.group import Group
from penstock.quantization.device import DeviceWeight, make_weight
from penstock.quantization.schemes import Format, Scheme

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class DeviceMaterials:
    """What the leaves of one rank's model are made of."""

    dtype: torch.dtype  # of activations, and of weights without quantization
    device: torch.device
    group: Group
    scheme: Scheme

    def matrix(self, form: Format, num_rows: int, num_columns: int) -> DeviceWeight:
        """Memory for a matrix of zeros."""
        return make_weight(form, num_rows, num_columns, self.dtype, self.device)

    def vector(self, size: int, value: float) -> torch.Tensor:
        """Memory for a bias or for the scale of a norm."""
        return torch.full((size,), value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Taken:
    """Takes in a whole tensor of a checkpoint and keeps this rank's share of it."""

    share: tuple[slice, ...]
    keep: Callable[[torch.Tensor], object]  # gets the share, on the device
    device: torch.device

    def __call__(self, stored: StoredTensor) -> None:
        """What `Weight.load` is."""
        dtype = _DTYPES[stored.dtype]
        raw = stored.data
        if raw.ctypes.data % dtype.itemsize:  # the format does not promise that numbers are aligned
            raw = raw.copy()
        self.take(stored.name, torch.from_numpy(raw).view(dtype).view(stored.shape))

    def take(self, name: str, values: torch.Tensor) -> None:
        """Keep the share of `values`, the whole tensor on any device."""
        try:
            self.keep(values[self.share].to(self.device))
        except EngineError as error:
            raise ModelLoadError(f"`{name}` cannot be quantized: {error.message}") from error


class Embedding:
    """One vector for each token id. A rank has those of its share of the ids."""

    def __init__(self, name: str, num_rows: int, size: int, materials: DeviceMaterials) -> None:
        self.name = name
        self.table, self._weight, self.ids = _table(name, num_rows, size, materials)
        self._group = materials.group

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]."""
        yield self._weight

    def finish(self) -> None:
        """Derive what the products read."""
        self.table.finish()

    def __call__(self, batch: DeviceBatch) -> torch.Tensor:
        """Vectors [T, size] of the batch's ids: a new tensor, which the caller may change."""
        if self._group.size == 1:
            return self.table.rows(batch.input_ids)
        ids = batch.input_ids - self.ids.start
        is_here = (ids >= 0) & (ids < self.ids.stop - self.ids.start)
        vectors = self.table.rows(ids * is_here) * is_here[:, None]
        return self._group.all_reduce(vectors)


class Linear:
    """y = x W^T + b, where the rows of W are this rank's of each part, one part after the other.

    One that `reduces` has this rank's columns of all rows: what it returns is summed over the
    ranks, the bias once. A gated one returns silu(gate) * up.
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
    ) -> None:
        group = materials.group
        self._in_size = in_size
        self._parts = parts
        self._gated = gated
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
            keep: Callable[[torch.Tensor], object] = partial(self.weight.fill, first)
            taken = Taken((rows, self._columns), keep, self._device)
            yield Weight(f"{part.name}.weight", (part.num_rows, self._in_size), taken)
            if self.bias is not None:
                keep = self.bias[first : first + _length(rows)].copy_
                taken = Taken((rows,), keep, self._device)
                yield Weight(f"{part.name}.bias", (part.num_rows,), taken)
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
        if self._gated:
            return gated_product(y)
        return self._group.all_reduce(y) if self._reduces else y


class Norm:
    """Root mean square norm of a residual sum, in one kernel. Every rank has it whole."""

    def __init__(self, name: str, size: int, eps: float, materials: DeviceMaterials) -> None:
        self.name = name
        self.weight = materials.vector(size, 1.0)
        self._eps = eps

    def weights(self) -> Iterator[Weight]:
        """The scale, [size]."""
        taken = Taken((slice(None),), self.weight.copy_, self.weight.device)
        yield Weight(f"{self.name}.weight", tuple(self.weight.shape), taken)

    def finish(self) -> None:
        """Nothing to derive."""

    def add(self, residual: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """Add x, if any, to the residual stream in place and return the norm of the sum."""
        return add_rms_norm(x, residual, self.weight, self._eps)


class Unrotated(NamedTuple):
    """What a rotary leaf hands to attention, whose kernel rotates and stores in one pass."""

    qkv: torch.Tensor  # [T, (H + 2 * Hkv) * D]
    frequencies: torch.Tensor  # [D / 2] float32


class Rotary:
    """Rotary positions that are still to be applied: attention does it where it stores the keys."""

    def __init__(
        self, head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
    ) -> None:
        self._frequencies = torch.from_numpy(frequencies(head_dim, theta, scaling)).to(device)

    def __call__(self, qkv: torch.Tensor, batch: DeviceBatch) -> Unrotated:
        """The same numbers, and by what to turn them."""
        return Unrotated(qkv, self._frequencies)


class Attention:
    """One layer's attention over the pages, for the heads of this rank."""

    def __init__(self, layer: PagedLayer, heads: shards.Heads, head_dim: int) -> None:
        self._layer = layer
        self._heads = heads
        self._head_dim = head_dim

    def __call__(self, qkv: Unrotated, batch: DeviceBatch) -> torch.Tensor:
        """Rotate queries and keys, write keys and values, attend: [T, H * D]."""
        x, turns = qkv
        index, pages = self._layer.kv_index, batch.kv
        num_heads, num_kv_heads = self._heads
        rope_store(
            x,
            turns,
            batch.positions,
            batch.slots,
            pages.key(index),
            pages.value(index),
            pages.key_scale(index),
            pages.value_scale(index),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._head_dim,
        )
        num_tokens, size = len(x), num_heads * self._head_dim
        q = x[:, :size].view(num_tokens, num_heads, self._head_dim)
        return batch.attention.forward(q, self._layer, batch).reshape(num_tokens, size)


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
    ) -> None:
        self._group = materials.group
        self._num_rows = num_rows
        self._tied_to = tied_to
        if tied_to is None:
            self.table, self._weight, _ = _table(name, num_rows, size, materials)
        else:
            self.table = tied_to.table
            (original,) = tied_to.weights()
            self._weight = original._replace(name=f"{name}.weight", duplicate_of=original.name)

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one."""
        yield self._weight

    def finish(self) -> None:
        """Derive what the products read, unless the embedding does, and compile them."""
        if self._tied_to is None:
            self.table.finish()
        self.table.warm_up()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of hidden [L, size], on every rank; rows may be padded in memory."""
        logits = self.table(hidden)
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
    taken = Taken((ids, slice(None)), partial(table.fill, 0), materials.device)
    return table, Weight(f"{name}.weight", (num_rows, size), taken), ids


def _length(share: slice) -> int:
    length: int = share.stop - share.start
    return length

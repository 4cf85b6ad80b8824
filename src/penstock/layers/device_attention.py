"""The leaves around attention on a device: rotary positions, sinks, and the pages of one layer.

Owns the frequencies and the sinks. Where whole heads of queries and keys are turned, one kernel
turns and stores them; other turns are torch's, and that kernel then stores without turning.

Invariant: angles are fp32, and what is turned is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch

from penstock.attention.paged import DeviceBatch, PagedLayer
from penstock.kernels.rope_store import rope_store
from penstock.layers import shards
from penstock.layers.device_materials import DeviceMaterials, Taken, put
from penstock.layers.specs import AttentionSpec, RopeSpec
from penstock.layers.toolkit import Weight


class Turn(Protocol):
    """How attention turns queries and keys."""

    frequencies: torch.Tensor  # [D / 2] float32, radians a position, by which the kernel turns

    def apply(self, heads: torch.Tensor, positions: torch.Tensor) -> None:
        """What is to be done before: to heads [T, heads, D], in place."""


class Unrotated(NamedTuple):
    """What a rotary leaf hands to attention, which knows the heads of its rank."""

    qkv: torch.Tensor  # [T, (H + 2 * Hkv) * D]
    turn: Turn


class KernelRotary:
    """Whole heads, which the kernel turns where it stores the keys."""

    def __init__(self, spec: RopeSpec, device: torch.device) -> None:
        self.frequencies = torch.from_numpy(spec.frequencies()).to(device)

    def __call__(self, x: torch.Tensor, batch: DeviceBatch) -> Unrotated:
        """The same numbers, and how to turn them."""
        return Unrotated(x, self)

    def apply(self, heads: torch.Tensor, positions: torch.Tensor) -> None:
        """Nothing."""


class TorchRotary:
    """The first numbers of each head, or all of them and scaled; the kernel then turns nothing."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device) -> None:
        self.frequencies = torch.zeros(head_dim // 2, device=device)
        self._frequencies = torch.from_numpy(spec.frequencies()).to(device)
        self._factor = spec.factor
        self._dim = spec.dim

    def __call__(self, x: torch.Tensor, batch: DeviceBatch) -> Unrotated:
        """The same numbers, and how to turn them."""
        return Unrotated(x, self)

    def apply(self, heads: torch.Tensor, positions: torch.Tensor) -> None:
        """Turn them."""
        angles = (positions.float()[:, None] * self._frequencies)[:, None]
        cosines, sines = angles.cos().mul_(self._factor), angles.sin().mul_(self._factor)
        turning = heads[..., : self._dim]
        low, high = turning.float().chunk(2, -1)
        turned = torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1)
        turning.copy_(turned)


class Still:
    """Heads without positions."""

    def __init__(self, head_dim: int, device: torch.device) -> None:
        self.frequencies = torch.zeros(head_dim // 2, device=device)

    def apply(self, heads: torch.Tensor, positions: torch.Tensor) -> None:
        """Nothing."""


def is_turned_by_kernel(rope: RopeSpec, head_dim: int) -> bool:
    """Whether the kernel that stores keys can turn heads so: all of their numbers, unscaled."""
    return rope.dim == head_dim and rope.factor == 1.0


class Attention:
    """One layer's attention over the pages, for the heads of this rank."""

    def __init__(
        self, kv_index: int, spec: AttentionSpec, sinks: str | None, materials: DeviceMaterials
    ) -> None:
        group = materials.group
        self._heads = shards.heads(spec.num_heads, spec.num_kv_heads, group.size)
        self._head_dim = spec.head_dim
        self._num_sinks = spec.num_heads
        self._sinks_name = sinks
        self._sinks: torch.Tensor | None = None
        num_heads = self._heads.num_heads
        if sinks is not None:
            self._sinks = materials.vector(num_heads, 0.0, is_wide=True)
            own = slice(group.rank * num_heads, (group.rank + 1) * num_heads)
            self._taken = Taken((own,), partial(put, self._sinks), materials.device)
        self._layer = PagedLayer(kv_index, spec.scale, spec.window, spec.softcap, self._sinks)
        self._still = None if spec.rope else Still(spec.head_dim, materials.device)

    def weights(self) -> Iterator[Weight]:
        """The sinks, [H], if there are any."""
        if self._sinks_name is not None:
            yield Weight(self._sinks_name, (self._num_sinks,), self._taken)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, qkv: Unrotated | torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """Rotate queries and keys, if need be, write keys and values, attend: [T, H * D]."""
        x, turn = qkv if isinstance(qkv, Unrotated) else (qkv, self._still)
        assert turn is not None, "a layer with positions, and nobody turned its heads"
        index, pages = self._layer.kv_index, batch.kv
        num_heads, num_kv_heads = self._heads
        num_tokens, size = len(x), num_heads * self._head_dim
        heads = x.view(num_tokens, x.shape[1] // self._head_dim, self._head_dim)
        turn.apply(heads[:, : num_heads + num_kv_heads], batch.positions)
        rope_store(
            x,
            turn.frequencies,
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
        out = batch.attention.forward(heads[:, :num_heads], self._layer, batch)
        return out.reshape(num_tokens, size)

"""The keys and values of every computed token: one allocation, addressed by slot.

Owns the memory and its layout. Knows neither requests nor which blocks are free: a slot is one
token's place in every layer. A backend that wants another layout or number format brings its own.

Invariant: the store is one tensor of exactly `num_slots * bytes_per_token` bytes, always finite.
"""

from __future__ import annotations

import torch


class KVStore:
    """Keys and values laid out [layer, head, slot, D], the key heads before the value heads.

    Head-major, because attention then multiplies matrices that lie in memory as they are: measured
    twice as fast in decode as the token-major layout. It starts as zeros, so that whoever gathers
    whole blocks and masks the unused slots never multiplies a NaN by zero.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, 2 * num_kv_heads, num_slots, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_slots = num_slots
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        # Views made once: making one costs a microsecond, and a step needs some in every layer.
        self._layers = list(self.data.unbind(0))
        self._keys = [layer[:num_kv_heads].transpose(0, 1) for layer in self._layers]
        self._values = [layer[num_kv_heads:].transpose(0, 1) for layer in self._layers]

    @staticmethod
    def bytes_per_token(
        num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes that one slot takes over all layers."""
        return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize

    def write(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Put k and v [T, Hkv, D] into the slots [T] of a layer. The slots are distinct."""
        self._keys[layer].index_copy_(0, slot_mapping, k)
        self._values[layer].index_copy_(0, slot_mapping, v)

    def key(self, layer: int) -> torch.Tensor:
        """The keys of a layer, [num_slots, Hkv, D]: a strided view."""
        return self._keys[layer]

    def value(self, layer: int) -> torch.Tensor:
        """The values of a layer, [num_slots, Hkv, D]: a strided view."""
        return self._values[layer]

    def blocks(self, layer: int, block_size: int) -> torch.Tensor:
        """The layer by blocks, [2 * Hkv, num_slots // block_size, block_size * D]: a view.

        `block_size` divides `num_slots`.
        """
        return self._layers[layer].view(
            2 * self.num_kv_heads, self.num_slots // block_size, block_size * self.head_dim
        )

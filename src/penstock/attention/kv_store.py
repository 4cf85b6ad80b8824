"""The keys and values of every computed token: one allocation, addressed by slot.

Owns the memory and its layout. Knows neither requests nor which blocks are free: a slot is one
token's place in every layer. A backend that wants another layout or number format brings its own.

Invariant: one tensor, of as many bytes as `ModelSpec.kv_bytes_per_token` says; always finite.
"""

from __future__ import annotations

import math

import numpy as np
import torch

CACHE_LINE_BYTES = 64


class KVStore:
    """Keys and values laid out [layer, head, slot, D], the key heads before the value heads.

    Head-major, because attention then multiplies matrices that lie in memory as they are: measured
    twice as fast in decode as the token-major layout. It starts as zeros, so that whoever gathers
    whole blocks and masks the unused slots never multiplies a NaN by zero. A store of latents has
    one vector a token, `num_vectors` 1, which is key and value.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_vectors: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_vectors, num_slots, head_dim)
        num_kv_heads = (num_vectors + 1) // 2
        self.data = _zeros(shape, dtype, torch.device(device))
        self.num_slots = num_slots
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        # Views made once: making one costs a microsecond, and a step needs some in every layer.
        self._layers = list(self.data.unbind(0))
        self._keys = [layer[:num_kv_heads].transpose(0, 1) for layer in self._layers]
        self._values = [layer[num_kv_heads:].transpose(0, 1) for layer in self._layers]

    def write(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Put k and v [T, Hkv, D] into the slots [T] of a layer. The slots are distinct."""
        self._keys[layer].index_copy_(0, slot_mapping, k)
        self._values[layer].index_copy_(0, slot_mapping, v)

    def write_latent(
        self, layer: int, latent: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """Put latents [T, D] into the slots [T] of a layer; all of them, [num_slots, 1, D]."""
        self._layers[layer][0].index_copy_(0, slot_mapping, latent)
        return self._keys[layer]

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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU of pages that the system makes when they are first touched.

    Writing them at the start would take up to a second for each GiB. Aligned to cache lines.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + CACHE_LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)

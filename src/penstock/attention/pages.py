"""The keys and values of every computed token in pages on a device: one allocation, by block.

Owns the memory, its layout and its number formats. Knows neither requests nor which blocks are
free. Whoever writes 8-bit pages writes the scale of each vector beside them.

Invariant: everything starts as zeros, and later holds what was written last: values of a request
whose numbers overflowed stay infinite until somebody else writes there. Who reads must therefore
not count on finite numbers where no token of its own is. The last block, `dummy_block`, belongs to
nobody: padding writes there.
"""

from __future__ import annotations

import torch

PAGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
SCALED = frozenset({"int8", "fp8"})  # formats with a float32 scale for each vector


class KVPages:
    """Keys and values laid out [layer, key or value, block, KV head, token of the block, D].

    One head's tokens of a block lie side by side, so that a kernel, which computes one KV head,
    streams block_size * D numbers at a time. 8-bit formats have a float32 scale for each vector, in
    a second tensor of the same layout without D.

    Args:
        num_blocks: blocks that requests may use; one more, the dummy, is allocated behind them.
        num_kv_heads: of this rank.
        dtype: one of `PAGE_DTYPES`.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, 2, num_blocks + 1, num_kv_heads, block_size)
        self.num_blocks = num_blocks
        self.dummy_block = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.data = torch.zeros((*shape, head_dim), dtype=PAGE_DTYPES[dtype], device=device)
        self.scales = torch.zeros(shape, device=device) if dtype in SCALED else None
        # Views made once: making one costs a microsecond, and a step needs four in every layer.
        self._data = [layer.unbind(0) for layer in self.data.unbind(0)]
        self._scales = (
            None if self.scales is None else [layer.unbind(0) for layer in self.scales.unbind(0)]
        )

    @property
    def num_bytes(self) -> int:
        """What it takes on the device, the dummy block and the scales included."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def key(self, layer: int) -> torch.Tensor:
        """The keys of a layer, [num_blocks + 1, Hkv, block_size, D]."""
        return self._data[layer][0]

    def value(self, layer: int) -> torch.Tensor:
        """The values of a layer, [num_blocks + 1, Hkv, block_size, D]."""
        return self._data[layer][1]

    def key_scale(self, layer: int) -> torch.Tensor | None:
        """A float32 factor for each key, [num_blocks + 1, Hkv, block_size]; None if not 8-bit."""
        return None if self._scales is None else self._scales[layer][0]

    def value_scale(self, layer: int) -> torch.Tensor | None:
        """As `key_scale`, for the values."""
        return None if self._scales is None else self._scales[layer][1]

"""The keys and values of every computed token, as the attention op reads them.

Owns the memory: [layer, vector, slot, D], and for int8 one scale for each token and vector. The
vectors of a token are its keys and values, 2 * Hkv, keys first; or one latent. Knows neither
requests nor blocks. Pages are made when they are touched, and are small: the first tokens touch
every layer and head, which in huge pages took 0.5 GiB of a model of 1 B parameters, and attention
over 4,000 tokens was as fast in small ones.
"""

from __future__ import annotations

from penstock.native.memory import allocate
from penstock.native.structs import DTYPES

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4  # of int8, for each vector


class KVMemory:
    """Keys and values of `num_slots` tokens in every layer."""

    def __init__(
        self, num_layers: int, num_slots: int, num_vectors: int, size: int, dtype: str
    ) -> None:
        """Memory for `num_vectors` vectors of `size` numbers a token: float32, bfloat16 or int8."""
        self.num_slots = num_slots
        self.dtype = dtype
        self._layer_bytes = num_vectors * num_slots * size * ITEM_BYTES[dtype]
        self._scale_bytes = num_vectors * num_slots * SCALE_BYTES if dtype == "int8" else 0
        self.data = allocate(num_layers * self._layer_bytes, huge_pages=False)
        self.scales = allocate(num_layers * self._scale_bytes, huge_pages=False)

    @property
    def dtype_id(self) -> int:
        """As the library has it."""
        return DTYPES[self.dtype]

    def layer(self, index: int) -> int:
        """Address of the vectors of a layer."""
        return int(self.data.ctypes.data) + index * self._layer_bytes

    def layer_scales(self, index: int) -> int | None:
        """Address of the scales of a layer; None without any."""
        if not self._scale_bytes:
            return None
        return int(self.scales.ctypes.data) + index * self._scale_bytes

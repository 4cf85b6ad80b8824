"""The leaves in front of attention in torch: grouped-query and latent.

Owns sinks and the map from latents to keys and values. Holds no state from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.attention.base import AttentionLayer, TorchBatch
from penstock.attention.general import Kind, attend
from penstock.layers.materials import Materials, weight
from penstock.layers.specs import AttentionSpec, LatentSpec
from penstock.layers.toolkit import Weight


class Attention:
    """One layer's attention: by the backend in the batch where it is plain."""

    def __init__(
        self, kv_index: int, spec: AttentionSpec, sinks: str | None, materials: Materials
    ) -> None:
        self._kv_index = kv_index
        self._spec = spec
        self._sinks_name = sinks
        self._sinks = None if sinks is None else materials.empty(spec.num_heads)
        self._layer = AttentionLayer(kv_index, spec.scale)

    def weights(self) -> Iterator[Weight]:
        """The sinks, [H], if there are any."""
        if self._sinks is not None and self._sinks_name is not None:
            yield weight(self._sinks_name, self._sinks)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, qkv: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        """[T, H * D] of qkv [T, (H + 2 * Hkv) * D]."""
        spec, num_tokens = self._spec, len(qkv)
        heads = qkv.view(num_tokens, -1, spec.head_dim)
        first_value = spec.num_heads + spec.num_kv_heads
        q, k, v = (
            heads[:, : spec.num_heads],
            heads[:, spec.num_heads : first_value],
            heads[:, first_value:],
        )
        kind = Kind(spec.scale, spec.window, spec.softcap, self._sinks, spec.is_causal)
        if kind.is_plain:
            out = batch.attention.forward(q, k, v, self._layer, batch)
        else:
            kv = batch.kv
            kv.write(self._kv_index, k, v, batch.slot_mapping)
            out = attend(q, kv.key(self._kv_index), kv.value(self._kv_index), kind, batch)
        return out.reshape(num_tokens, -1)


class LatentAttention:
    """Latent attention, absorbed: queries are mapped to latents, and attend to these."""

    def __init__(self, kv_index: int, spec: LatentSpec, name: str, materials: Materials) -> None:
        self.name = name
        self._kv_index = kv_index
        self._spec = spec
        self._up = materials.empty(spec.num_heads * (spec.nope_dim + spec.value_dim), spec.rank)

    def weights(self) -> Iterator[Weight]:
        """The map to keys and values, head by head."""
        yield weight(f"{self.name}.weight", self._up)

    def finish(self) -> None:
        """Take the maps to keys and to values apart."""
        spec = self._spec
        heads = self._up.view(spec.num_heads, -1, spec.rank)
        self._to_keys, self._to_values = heads[:, : spec.nope_dim], heads[:, spec.nope_dim :]

    def __call__(self, q: torch.Tensor, latent: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        """[T, H * value_dim] of q [T, H * key_dim] and latent [T, rank + rope dim]."""
        spec, num_tokens = self._spec, len(q)
        heads = q.view(num_tokens, spec.num_heads, -1)
        plain, rotated = heads[..., : spec.nope_dim], heads[..., spec.nope_dim :]
        absorbed = torch.einsum("thd,hdr->thr", plain, self._to_keys)
        queries = torch.cat((absorbed, rotated), -1)
        keys = batch.kv.write_latent(self._kv_index, latent, batch.slot_mapping)
        out = attend(queries, keys, keys[..., : spec.rank], Kind(spec.scale), batch)
        return torch.einsum("thr,hdr->thd", out, self._to_values).reshape(num_tokens, -1)

"""The pieces that decoder-only transformers are composed of.

Owns the order of operations in a layer and in a model. Knows neither the names of a checkpoint
(an architecture's file gives them) nor requests.

Invariant: a piece reads the batch that it is given and holds no state from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from penstock.attention.base import AttentionLayer, ForwardBatch
from penstock.layers.embedding import Embedding, LMHead
from penstock.layers.linear import Linear
from penstock.layers.norm import RMSNorm
from penstock.layers.rotary import RopeAngles, Rotary
from penstock.layers.weights import Layer
from penstock.models.spec import ModelSpec


class Attention:
    """Grouped-query attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(
        self,
        spec: ModelSpec,
        kv_index: int,
        *,
        qkv: Linear,
        output: Linear,
        rotary: Rotary,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self._rotary = rotary
        self._num_heads = spec.num_heads
        self._num_rotated = spec.num_heads + spec.num_kv_heads
        self._head_dim = spec.head_dim
        self._layer = AttentionLayer(kv_index, spec.head_dim**-0.5)

    def layers(self) -> Iterator[Layer]:
        """The leaves."""
        yield self.qkv
        yield self.output

    def __call__(self, x: torch.Tensor, angles: RopeAngles, batch: ForwardBatch) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        num_tokens = len(x)
        qkv = self.qkv(x).view(num_tokens, -1, self._head_dim)  # [T, H + 2 * Hkv, D]
        # Query and key heads lie side by side, so that one call rotates both.
        qk = self._rotary(qkv[:, : self._num_rotated], angles)
        out = batch.attention.forward(
            qk[:, : self._num_heads],
            qk[:, self._num_heads :],
            qkv[:, self._num_rotated :],
            self._layer,
            batch,
        )
        return self.output(out.reshape(num_tokens, -1))


class GatedMLP:
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def layers(self) -> Iterator[Layer]:
        """The leaves."""
        yield self.gate_up
        yield self.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(up))


class DecoderBlock:
    """Norm before attention, norm before the MLP, each added to the residual stream."""

    def __init__(
        self, *, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def layers(self) -> Iterator[Layer]:
        """The leaves."""
        yield self.attention_norm
        yield from self.attention.layers()
        yield self.mlp_norm
        yield from self.mlp.layers()

    def __call__(
        self, residual: torch.Tensor, x: torch.Tensor, angles: RopeAngles, batch: ForwardBatch
    ) -> torch.Tensor:
        """Add x [T, hidden] and this block's attention to the residual stream in place.

        Returns what the block's MLP adds: the next norm sums it, so that a backend may fuse the
        sum with the norm.
        """
        x = self.attention(self.attention_norm.add(residual, x), angles, batch)
        return self.mlp(self.mlp_norm.add(residual, x))


class Decoder:
    """A whole model. Inference only: no gradient is ever recorded."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embedding: Embedding,
        rotary: Rotary,
        blocks: Sequence[DecoderBlock],
        norm: RMSNorm,
        head: LMHead,
    ) -> None:
        self.spec = spec
        self.embedding = embedding
        self.rotary = rotary
        self.blocks = list(blocks)
        self.norm = norm
        self.head = head

    def layers(self) -> Iterator[Layer]:
        """The leaves, in the order of the data."""
        yield self.embedding
        for block in self.blocks:
            yield from block.layers()
        yield self.norm
        yield self.head

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute all tokens of the batch and store their keys and values.

        `batch.meta` must hold what `batch.attention.plan(batch)` returned.

        Returns:
            The last hidden states, [T, hidden]. The caller picks rows and asks for `logits`.
        """
        residual = self.embedding(batch.input_ids)
        angles = self.rotary.angles(batch.positions)
        x = torch.zeros((), dtype=residual.dtype, device=residual.device)
        for block in self.blocks:
            x = block(residual, x, angles, batch)
        return self.norm.add(residual, x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, [L, V] float32, of hidden states [L, hidden]."""
        return self.head(hidden)

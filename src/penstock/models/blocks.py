"""The pieces that decoder-only transformers are composed of.

Owns the order of operations in a layer and in a model. Knows neither the names of a checkpoint
(an architecture's file gives them) nor requests, nor who computes: the leaves come from a toolkit,
and what flows between them is theirs.

Invariant: a piece reads the batch that it is given and holds no state from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from penstock.layers.toolkit import (
    Attention,
    Batch,
    Embedding,
    Head,
    Layer,
    Linear,
    Norm,
    Rotary,
    Value,
)
from penstock.models.spec import ModelSpec


class SelfAttention:
    """Grouped-query attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(
        self, *, qkv: Linear, rotary: Rotary, attention: Attention, output: Linear
    ) -> None:
        self.qkv = qkv
        self.output = output
        self._rotary = rotary
        self._attention = attention

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield self.qkv
        yield self.output

    def __call__(self, x: Value, batch: Batch) -> Value:
        """[T, hidden] to [T, hidden]."""
        return self.output(self._attention(self._rotary(self.qkv(x), batch), batch))


class GatedMLP:
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up  # a gated one
        self.down = down

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield self.gate_up
        yield self.down

    def __call__(self, x: Value) -> Value:
        """[T, hidden] to [T, hidden]."""
        return self.down(self.gate_up(x))


class DecoderBlock:
    """Norm before attention, norm before the MLP, each added to the residual stream."""

    def __init__(
        self, *, attention_norm: Norm, attention: SelfAttention, mlp_norm: Norm, mlp: GatedMLP
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield self.attention_norm
        yield from self.attention.layers()
        yield self.mlp_norm
        yield from self.mlp.layers()

    def __call__(self, residual: Value, x: Value | None, batch: Batch) -> Value:
        """Add x [T, hidden], if any, and this block's attention to the residual stream in place.

        Returns what the block's MLP adds: the next norm sums it, so that a backend may fuse the
        sum with the norm.
        """
        x = self.attention(self.attention_norm.add(residual, x), batch)
        return self.mlp(self.mlp_norm.add(residual, x))


class Decoder:
    """A whole model. Inference only: no gradient is ever recorded."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embedding: Embedding,
        blocks: Sequence[DecoderBlock],
        norm: Norm,
        head: Head,
    ) -> None:
        self.spec = spec
        self.embedding = embedding
        self.blocks = list(blocks)
        self.norm = norm
        self.head = head

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers, in the order of the data."""
        yield self.embedding
        for block in self.blocks:
            yield from block.layers()
        yield self.norm
        yield self.head

    def forward(self, batch: Batch) -> Value:
        """Compute all tokens of the batch and store their keys and values.

        Returns:
            The last hidden states, [T, hidden]. The caller picks rows and asks for `logits`.
        """
        residual = self.embedding(batch)
        x = None
        for block in self.blocks:
            x = block(residual, x, batch)
        return self.norm.add(residual, x)

    def logits(self, hidden: Value) -> Value:
        """Scores of the next token, [L, V], of hidden states [L, hidden]."""
        return self.head(hidden)

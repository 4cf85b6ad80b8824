"""The pieces that transformers are composed of.

Owns the order of operations in a layer and in a model. Knows neither the names of a checkpoint
(`compose` gives them) nor requests, nor who computes: the leaves come from a toolkit, and what
flows between them is theirs.

Invariant: a piece reads the batch that it is given and holds no state from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.layers import toolkit
from penstock.layers.classifier import Classifier
from penstock.layers.toolkit import Batch, Layer, Linear, Norm, Toolkit, Value
from penstock.models.spec import ModelSpec


class Piece(Protocol):
    """What a block maps its stream with."""

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""

    def __call__(self, x: Value, batch: Batch) -> Value:
        """[T, hidden] to [T, hidden]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAttention:
    """Grouped-query attention (Ainslie et al. 2023)."""

    qkv: Linear
    norms: Sequence[toolkit.SliceNorm]  # of queries and of keys, if any
    rotary: toolkit.Rotary | None
    attention: toolkit.Attention
    output: Linear

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield self.qkv
        yield from self.norms
        yield self.attention
        yield self.output

    def __call__(self, x: Value, batch: Batch) -> Value:
        """[T, hidden] to [T, hidden]."""
        # Apart, so that nothing holds queries, keys and values while the output is computed.
        return self.output(self._attended(x, batch))

    def _attended(self, x: Value, batch: Batch) -> Value:
        qkv = self.qkv(x)
        for norm in self.norms:
            qkv = norm(qkv)
        if self.rotary is not None:
            qkv = self.rotary(qkv, batch)
        return self.attention(qkv, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024)."""

    query_down: Linear | None
    query_norm: toolkit.SliceNorm | None
    query_up: Linear  # or the only map of queries
    query_rotary: toolkit.Rotary
    latent_down: Linear
    latent_norm: toolkit.SliceNorm
    latent_rotary: toolkit.Rotary
    attention: toolkit.LatentAttention
    output: Linear

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        leaves = (self.query_down, self.query_norm, self.query_up, self.latent_down)
        yield from (leaf for leaf in leaves if leaf is not None)
        yield self.latent_norm
        yield self.attention
        yield self.output

    def __call__(self, x: Value, batch: Batch) -> Value:
        """[T, hidden] to [T, hidden]."""
        q = x
        if self.query_down is not None and self.query_norm is not None:
            q = self.query_norm(self.query_down(x))
        q = self.query_rotary(self.query_up(q), batch)
        latent = self.latent_rotary(self.latent_norm(self.latent_down(x)), batch)
        return self.output(self.attention(q, latent, batch))


@dataclass(frozen=True, slots=True)
class MLP:
    """Two maps, the first of which has an activation and perhaps a gate."""

    up: Linear
    down: Linear

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield self.up
        yield self.down

    def __call__(self, x: Value, batch: Batch) -> Value:
        """[T, hidden] to [T, hidden]."""
        return self.down(self.up(x))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts, and an MLP beside them that every token takes."""

    experts: toolkit.Experts
    shared: MLP | None = None
    shared_gate: Linear | None = None

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield self.experts
        if self.shared is not None:
            yield from self.shared.layers()
        if self.shared_gate is not None:
            yield self.shared_gate

    def __call__(self, x: Value, batch: Batch) -> Value:
        """[T, hidden] to [T, hidden]."""
        shared = None if self.shared is None else self.shared(x, batch)
        gate = None if self.shared_gate is None else self.shared_gate(x)
        return self.experts(x, shared, gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Attention and an MLP with their norms, arranged as `ModelSpec.arrangement` says."""

    spec: ModelSpec
    toolkit: Toolkit
    attention: Piece
    mlp: Piece
    norms: Sequence[Norm]  # before, or of "encoder" behind: of attention, of the MLP if it has one
    after: Sequence[Norm] = ()  # behind attention and behind the MLP, before the sums

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers."""
        yield from self.norms
        yield from self.attention.layers()
        yield from self.after
        yield from self.mlp.layers()

    def __call__(self, residual: Value, x: Value | None, batch: Batch) -> tuple[Value, Value]:
        """Add x [T, hidden], if any, and this block's attention to the residual stream.

        Returns:
            The stream, and what the block's MLP adds: the next norm sums it, so that a backend may
            fuse the sum with the norm. An encoder's stream has it already, then it is None.
        """
        way: Any = getattr(self, f"_{self.spec.arrangement}")
        result: tuple[Value, Value] = way(residual, x, batch)
        return result

    def _pre(self, residual: Value, x: Value | None, batch: Batch) -> tuple[Value, Value]:
        first, second = self.norms
        scale = self.spec.residual_scale
        x = self.attention(first.add(residual, x, scale), batch)
        return residual, self.mlp(second.add(residual, x, scale), batch)

    def _sandwich(self, residual: Value, x: Value | None, batch: Batch) -> tuple[Value, Value]:
        first, second = self.norms
        after_attention, after_mlp = self.after
        x = after_attention(self.attention(first.add(residual, x), batch))
        return residual, after_mlp(self.mlp(second.add(residual, x), batch))

    def _post(self, residual: Value, x: Value | None, batch: Batch) -> tuple[Value, Value]:
        after_attention, after_mlp = self.after
        if x is not None:
            self.toolkit.add(residual, x)
        self.toolkit.add(residual, after_attention(self.attention(residual, batch)))
        return residual, after_mlp(self.mlp(residual, batch))

    def _parallel(self, residual: Value, x: Value | None, batch: Batch) -> tuple[Value, Value]:
        normed = self.norms[0].add(residual, x)
        for_mlp = self.norms[1](residual) if len(self.norms) > 1 else normed
        attended = self.attention(normed, batch)
        x = self.mlp(for_mlp, batch)
        self.toolkit.add(residual, attended)
        return residual, x

    def _encoder(self, residual: Value, x: Value | None, batch: Batch) -> tuple[Value, Value]:
        first, second = self.norms
        residual = first.renew(residual, self.attention(residual, batch))
        return second.renew(residual, self.mlp(residual, batch)), None


class Decoder:
    """A whole model. Inference only: no gradient is ever recorded."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embedding: toolkit.Embedding,
        embedding_norm: Norm | None,
        blocks: Sequence[Block],
        norm: Norm | None,
        head: toolkit.Head | None,
        classifier: Classifier | None = None,
    ) -> None:
        self.spec = spec
        self.embedding = embedding
        self.embedding_norm = embedding_norm
        self.blocks = list(blocks)
        self.norm = norm
        self.head = head
        self.classifier = classifier

    def layers(self) -> Iterator[Layer]:
        """The leaves that hold numbers, in the order of the data."""
        yield self.embedding
        if self.embedding_norm is not None:
            yield self.embedding_norm
        for block in self.blocks:
            yield from block.layers()
        if self.norm is not None:
            yield self.norm
        if self.head is not None:
            yield self.head
        if self.classifier is not None:
            yield self.classifier

    def forward(self, batch: Batch) -> Value:
        """Compute all tokens of the batch and store their keys and values.

        Returns:
            The last hidden states, [T, hidden]. The caller picks rows and asks for `logits`.
        """
        residual = self.embedding(batch)
        if self.embedding_norm is not None:
            residual = self.embedding_norm.renew(residual, None)
        x = None
        for block in self.blocks:
            residual, x = block(residual, x, batch)
        if self.norm is None:
            assert x is None, "only encoders, whose stream is whole, end without a norm"
            return residual
        return self.norm.add(residual, x, self.spec.residual_scale)

    def logits(self, hidden: Value) -> Value:
        """Scores of the next token, [L, V], of hidden states [L, hidden]."""
        assert self.head is not None, "a model without a head has no scores of tokens"
        return self.head(hidden)

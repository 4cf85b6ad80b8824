"""From a spec to a model: which leaves it has, of which tensors, in which order.

Owns the one way in which every architecture is put together; what differs between them lies in
`ModelSpec`. Knows no config and no numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.layers.classifier import Classifier
from penstock.layers.specs import AttentionSpec, ExpertsSpec, LatentSpec, MLPSpec, RopeSpec
from penstock.layers.toolkit import (
    ExpertNames,
    Linear,
    Norm,
    Part,
    PositionTable,
    Rotary,
    RowMap,
    SliceNorm,
    Toolkit,
)
from penstock.models.blocks import MLP, Block, Decoder, LatentAttention, Mixture, SelfAttention
from penstock.models.spec import LayerSpec, ModelSpec

Rows = NDArray[np.int64]


def compose(spec: ModelSpec, toolkit: Toolkit) -> Decoder:
    """Build the model; its weights are still to be loaded."""
    names, hidden = spec.names, spec.hidden_size
    positions = None
    if spec.num_positions:
        positions = PositionTable(
            names.positions,
            spec.num_positions,
            spec.first_position,
            names.token_types or None,
            spec.num_token_types,
        )
    embedding = toolkit.embedding(
        names.embedding,
        spec.vocab_size,
        hidden,
        scale=spec.embedding_scale,
        positions=positions,
    )
    head = None
    if spec.has_head and not spec.is_encoder:
        head = toolkit.head(
            names.head,
            spec.vocab_size,
            hidden,
            embedding if spec.tied_embeddings else None,
            bias=spec.has_head_bias,
            scale=spec.logit_scale,
            softcap=spec.logit_softcap,
        )
    norms = [
        toolkit.norm(name, hidden, spec.norm) if name else None
        for name in (names.embedding_norm, names.final_norm if spec.has_final_norm else "")
    ]
    rotaries: dict[tuple[RopeSpec, int, int, int, int], Rotary] = {}
    return Decoder(
        spec,
        embedding=embedding,
        embedding_norm=norms[0],
        blocks=[
            _Composer(spec, layer, index, toolkit, rotaries).block()
            for index, layer in enumerate(spec.layers)
        ],
        norm=norms[1],
        head=head,
        classifier=None if spec.classifier is None else Classifier(spec.classifier, hidden),
    )


class _Composer(NamedTuple):
    """Puts one block together."""

    spec: ModelSpec
    layer: LayerSpec
    number: int  # of the block
    toolkit: Toolkit
    rotaries: dict[tuple[RopeSpec, int, int, int, int], Rotary]  # those of equal use are shared

    def block(self) -> Block:
        """The block of this layer."""
        names, layer = self.spec.names, self.layer
        before, behind = [names.attention_norm, names.mlp_norm], []
        if self.spec.arrangement in {"sandwich", "post"}:
            behind = [names.after_attention, names.after_mlp]
        if self.spec.arrangement == "post":
            before = []
        attention = layer.attention
        mlp = layer.mlp
        return Block(
            spec=self.spec,
            toolkit=self.toolkit,
            attention=self._attention(attention)
            if isinstance(attention, AttentionSpec)
            else self._latent(attention),
            mlp=self._mlp(mlp, "") if isinstance(mlp, MLPSpec) else self._mixture(mlp),
            norms=[self._norm(name) for name in before if name],
            after=[self._norm(name) for name in behind],
        )

    def _name(self, name: str) -> str:
        return f"{self.spec.names.block.format(self.number)}.{name}"

    def _norm(self, name: str) -> Norm:
        return self.toolkit.norm(self._name(name), self.spec.hidden_size, self.spec.norm)

    def _linear(
        self, name: str, in_size: int, num_rows: int, *, bias: bool, reduces: bool = False
    ) -> Linear:
        part = self._part(name, num_rows)
        return self.toolkit.linear(in_size, [part], bias=bias, reduces=reduces)

    def _part(
        self,
        name: str,
        num_rows: int,
        num_units: int = 0,
        *,
        taken: Rows | None = None,
        num_stored: int = 0,
    ) -> Part:
        """Rows `taken` of a tensor of `num_stored`; None: all of them."""
        rows = None
        if taken is not None or self.spec.names.is_transposed:
            rows = RowMap(num_stored or num_rows, taken, self.spec.names.is_transposed)
        return Part(self._name(name), num_rows, num_units, rows)

    def _rotary(
        self, spec: RopeSpec, first: int, num_heads: int, head_dim: int, offset: int = 0
    ) -> Rotary:
        key = spec, first, num_heads, head_dim, offset
        if key not in self.rotaries:
            self.rotaries[key] = self.toolkit.rotary(
                spec, first=first, num_heads=num_heads, head_dim=head_dim, offset=offset
            )
        return self.rotaries[key]

    def _attention(self, spec: AttentionSpec) -> SelfAttention:
        names, hidden = self.spec.names, self.spec.hidden_size
        num_rotated = spec.num_heads + spec.num_kv_heads
        rotary = None
        if spec.rope is not None:
            rotary = self._rotary(spec.rope, 0, num_rotated, spec.head_dim)
        return SelfAttention(
            qkv=self.toolkit.linear(hidden, self._qkv(spec), bias=spec.has_bias),
            norms=self._qk_norms(spec),
            rotary=rotary,
            attention=self.toolkit.attention(
                self.number, spec, self._name(names.sinks) if spec.has_sinks else None
            ),
            output=self._linear(
                names.output, spec.q_size, hidden, bias=spec.has_output_bias, reduces=True
            ),
        )

    def _qkv(self, spec: AttentionSpec) -> list[Part]:
        """Queries, keys and values: tensors of their own, or rows of one."""
        names = self.spec.names
        num_heads, num_kv_heads = spec.num_heads, spec.num_kv_heads
        sizes = [num_heads, num_kv_heads, num_kv_heads]
        orders = [_halves(spec, count) for count in (num_heads, num_kv_heads)] + [None]
        if not names.qkv:
            return [
                self._part(name, count * spec.head_dim, count, taken=order)
                for name, count, order in zip(
                    (names.q, names.k, names.v), sizes, orders, strict=True
                )
            ]
        stored = (num_heads + 2 * num_kv_heads) * spec.head_dim
        return [
            self._part(
                names.qkv,
                len(rows),
                count,
                taken=rows if order is None else rows[order],
                num_stored=stored,
            )
            for rows, count, order in zip(
                joined_rows(spec, names.qkv_rows), sizes, orders, strict=True
            )
        ]

    def _qk_norms(self, spec: AttentionSpec) -> list[SliceNorm]:
        """The norms of queries and of keys."""
        if spec.qk_norm is None:
            return []
        names, made = self.spec.names, []
        first = 0
        for name, count in ((names.q_norm, spec.num_heads), (names.k_norm, spec.num_kv_heads)):
            joined = spec.qk_norm_over == "all"
            order = _halves(spec, 1 if spec.qk_norm_over == "head" else count)
            made.append(
                self.toolkit.slice_norm(
                    self._name(name),
                    spec.qk_norm,
                    first=first,
                    num_runs=1 if joined else count,
                    size=count * spec.head_dim if joined else spec.head_dim,
                    is_shared=spec.qk_norm_over != "heads",
                    rows=None if order is None else RowMap(len(order), order),
                )
            )
            first += count * spec.head_dim
        return made

    def _latent(self, spec: LatentSpec) -> LatentAttention:
        names, hidden, toolkit = self.spec.names, self.spec.hidden_size, self.toolkit
        q_size = spec.num_heads * spec.key_dim
        query_name, query_in = names.q, hidden
        query_down, query_norm = None, None
        if spec.query_rank:
            query_name, query_in = names.query_up, spec.query_rank
            query_down = self._linear(names.query_down, hidden, spec.query_rank, bias=spec.has_bias)
            query_norm = toolkit.slice_norm(
                self._name(names.query_down_norm),
                spec.norm,
                first=0,
                num_runs=1,
                size=spec.query_rank,
            )
        latent_size = spec.rank + spec.rope.dim
        query = self._part(
            query_name, q_size, spec.num_heads, taken=_tails(spec, spec.num_heads, spec.nope_dim)
        )
        latent = self._part(names.latent_down, latent_size, taken=_tails(spec, 1, spec.rank))
        return LatentAttention(
            query_down=query_down,
            query_norm=query_norm,
            query_up=toolkit.linear(query_in, [query], bias=False),
            query_rotary=self._rotary(spec.rope, 0, spec.num_heads, spec.key_dim, spec.nope_dim),
            latent_down=toolkit.linear(hidden, [latent], bias=spec.has_bias),
            latent_norm=toolkit.slice_norm(
                self._name(names.latent_norm), spec.norm, first=0, num_runs=1, size=spec.rank
            ),
            latent_rotary=self._rotary(spec.rope, spec.rank, 1, spec.rope.dim),
            attention=toolkit.latent_attention(self.number, spec, self._name(names.latent_up)),
            output=self._linear(
                names.output,
                spec.num_heads * spec.value_dim,
                hidden,
                bias=spec.has_bias,
                reduces=True,
            ),
        )

    def _mlp(self, spec: MLPSpec, prefix: str) -> MLP:
        """An MLP; `prefix` stands before the names of one that is not the block's own."""
        names, hidden, size = self.spec.names, self.spec.hidden_size, spec.size
        gate, up, down = names.gate, names.up, names.down
        if prefix:
            gate, up, down = (
                f"{prefix}.{name}"
                for name in (names.expert_gate, names.expert_up, names.expert_down)
            )
        if not spec.is_gated:
            parts = [self._part(up, size)]
        elif names.gate_up and not prefix:
            parts = [
                self._part(
                    names.gate_up, size, taken=np.arange(first, first + size), num_stored=2 * size
                )
                for first in (0, size)
            ]
        else:
            parts = [self._part(gate, size), self._part(up, size)]
        return MLP(
            self.toolkit.linear(
                hidden,
                parts,
                bias=spec.has_bias,
                gated=spec.is_gated,
                activation=spec.activation,
            ),
            self._linear(down, size, hidden, bias=spec.has_bias, reduces=True),
        )

    def _mixture(self, spec: ExpertsSpec) -> Mixture:
        names, hidden = self.spec.names, self.spec.hidden_size
        expert = self._name(names.expert)
        experts = self.toolkit.experts(
            hidden,
            spec,
            ExpertNames(
                router=self._name(names.router),
                gate=f"{expert}.{names.expert_gate}",
                up=f"{expert}.{names.expert_up}",
                down=f"{expert}.{names.expert_down}",
                correction=self._name(names.correction),
            ),
        )
        if not spec.shared_size:
            return Mixture(experts)
        shared = self._mlp(MLPSpec(size=spec.shared_size, activation=spec.activation), names.shared)
        gate = None
        if spec.has_shared_gate:
            gate = self._linear(names.shared_gate, hidden, 1, bias=False)
        return Mixture(experts, shared, gate)


def joined_rows(spec: AttentionSpec, order: str) -> list[Rows]:
    """The rows of queries, of keys and of values in a tensor that holds all three."""
    size, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    rows = np.arange((spec.num_heads + 2 * spec.num_kv_heads) * size)
    if order == "stacked":
        cuts = [spec.q_size, spec.q_size + spec.kv_size]
        return list(np.split(rows, cuts))
    # A group: its queries, its key, its value. Heads are groups of one.
    groups = rows.reshape(spec.num_kv_heads, group + 2, size)
    return [part.reshape(-1) for part in np.split(groups, [group, group + 1], 1)]


def _halves(spec: AttentionSpec, num_heads: int) -> Rows | None:
    """The order in which rows of interleaved pairs are rows of halves; None: they are."""
    if spec.rope is None or not spec.rope.is_interleaved:
        return None
    order = np.arange(spec.head_dim)
    order[: spec.rope.dim] = order[: spec.rope.dim].reshape(-1, 2).T.reshape(-1)
    return (np.arange(num_heads)[:, None] * spec.head_dim + order).reshape(-1)


def _tails(spec: LatentSpec, num_heads: int, offset: int) -> Rows | None:
    """The same for heads whose rotated rows are the last, behind `offset` others."""
    if not spec.rope.is_interleaved:
        return None
    order = np.arange(offset + spec.rope.dim)
    order[offset:] = order[offset:].reshape(-1, 2).T.reshape(-1)
    return (np.arange(num_heads)[:, None] * len(order) + order).reshape(-1)

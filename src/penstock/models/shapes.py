"""What a model holds, counted: a toolkit whose leaves are only sizes.

Owns `ModelShapes`. What memory plans and estimates of speed know of a model comes from here, and so
from the same composition that computes it: no architecture has its sizes written down twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from penstock.layers import toolkit
from penstock.layers.specs import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    NormSpec,
    RopeSpec,
)
from penstock.layers.toolkit import ExpertNames, Part, PositionTable, RowMap
from penstock.models.compose import compose
from penstock.models.spec import ModelSpec

# latent: that from latents to the keys and values of all heads, which the native library splits.
Role = Literal["linear", "table", "head", "expert", "router", "latent"]


class MatrixShape(NamedTuple):
    """One matrix as a leaf holds it: its parts joined, if there are several."""

    parts: tuple[str, ...]  # names of weights in the checkpoint, ".weight" included
    num_rows: int
    num_columns: int
    role: Role
    is_gated: bool = False
    share: float = 1.0  # of the tokens that are multiplied with it: of experts top_k / num_experts
    part_rows: tuple[int, ...] = ()  # rows of each part

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """Every matrix, and how many numbers there are beside them."""

    matrices: tuple[MatrixShape, ...]
    num_vector_parameters: int  # of norms, biases, learned positions and a classifier

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights; tied tables count once."""
        return self.num_vector_parameters + sum(shape.num_parameters for shape in self.matrices)

    @property
    def num_active_parameters(self) -> float:
        """Numbers that one token is multiplied with: of experts those it takes; no embedding."""
        return sum(
            shape.num_parameters * shape.share for shape in self.matrices if shape.role != "table"
        )


@lru_cache(maxsize=16)
def shapes_of(spec: ModelSpec) -> ModelShapes:
    """Count a model's numbers."""
    counting = _Counting()
    classifier = compose(spec, counting).classifier
    weights = [] if classifier is None else classifier.weights()
    num_others = counting.num_vector_parameters + sum(math.prod(w.shape) for w in weights)
    return ModelShapes(tuple(counting.matrices), num_others)


def _matrix(
    parts: Sequence[tuple[str, int]], num_columns: int, role: Role, *, is_gated: bool = False
) -> MatrixShape:
    """Of parts with their names and rows."""
    return MatrixShape(
        tuple(f"{name}.weight" for name, _ in parts),
        sum(num_rows for _, num_rows in parts),
        num_columns,
        role,
        is_gated,
        part_rows=tuple(num_rows for _, num_rows in parts),
    )


class _Leaf:
    """Stands for any leaf: holds nothing and computes nothing."""


@dataclass
class _Counting:
    """Implements `Toolkit`."""

    matrices: list[MatrixShape] = field(default_factory=list)
    num_vector_parameters: int = 0

    def embedding(
        self,
        name: str,
        num_rows: int,
        size: int,
        *,
        scale: float = 1.0,
        positions: PositionTable | None = None,
    ) -> Any:
        self.matrices.append(_matrix([(name, num_rows)], size, "table"))
        if positions is not None:
            self.num_vector_parameters += (positions.num_rows + positions.num_types) * size
        return _Leaf()

    def linear(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool = False,
        activation: Activation | None = None,
        reduces: bool = False,
    ) -> Any:
        joined = _matrix(
            [(part.name, part.num_rows) for part in parts], in_size, "linear", is_gated=gated
        )
        self.matrices.append(joined)
        self.num_vector_parameters += joined.num_rows * bias
        return _Leaf()

    def norm(self, name: str, size: int, spec: NormSpec) -> Any:
        self.num_vector_parameters += size * (spec.has_scale + spec.has_bias)
        return _Leaf()

    def slice_norm(
        self,
        name: str,
        spec: NormSpec,
        *,
        first: int,
        num_runs: int,
        size: int,
        is_shared: bool = True,
        rows: RowMap | None = None,
    ) -> Any:
        self.num_vector_parameters += size * spec.has_scale * (1 if is_shared else num_runs)
        return _Leaf()

    def rotary(
        self, spec: RopeSpec, *, first: int, num_heads: int, head_dim: int, offset: int = 0
    ) -> Any:
        return _Leaf()

    def add(self, residual: Any, x: Any, scale: float = 1.0) -> None:
        raise AssertionError("a toolkit that only counts")

    def attention(self, kv_index: int, spec: AttentionSpec, sinks: str | None = None) -> Any:
        self.num_vector_parameters += spec.num_heads if sinks is not None else 0
        return _Leaf()

    def latent_attention(self, kv_index: int, spec: LatentSpec, name: str) -> Any:
        num_rows = spec.num_heads * (spec.nope_dim + spec.value_dim)
        self.matrices.append(_matrix([(name, num_rows)], spec.rank, "latent"))
        return _Leaf()

    def experts(self, in_size: int, spec: ExpertsSpec, names: ExpertNames) -> Any:
        count, size, share = spec.num_experts, spec.size, spec.top_k / spec.num_experts
        self.matrices.append(_matrix([(names.router, count)], in_size, "router"))
        for number in range(count):
            gate, up, down = (name.format(number) for name in (names.gate, names.up, names.down))
            pair = _matrix([(gate, size), (up, size)], in_size, "expert", is_gated=True)
            back = _matrix([(down, in_size)], size, "expert")
            self.matrices += [pair._replace(share=share), back._replace(share=share)]
        biases = count * (2 * size + in_size) * spec.has_bias
        self.num_vector_parameters += biases + count * (spec.has_correction + spec.has_router_bias)
        return _Leaf()

    def head(
        self,
        name: str,
        num_rows: int,
        size: int,
        tied_to: toolkit.Embedding | None,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> Any:
        if tied_to is None:
            self.matrices.append(_matrix([(name, num_rows)], size, "head"))
        self.num_vector_parameters += num_rows * bias
        return _Leaf()

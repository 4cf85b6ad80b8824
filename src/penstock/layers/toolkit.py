"""What a model is composed of, whoever computes it: leaves, and the toolkit that makes them.

Owns the protocols of the leaves and how a leaf says which tensors of a checkpoint it holds. Knows
neither files nor models, and imports no torch. A toolkit's leaves either compute (torch tensors)
or record (the operations of a program); a composition cannot tell which.

Invariant: what flows between leaves is opaque. A composition hands it on and does nothing else with
it, and the loader delivers bytes by name and shape; how they lie in memory (joined, converted,
packed) is the business of the leaf that holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.layers.specs import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    NormSpec,
    RopeSpec,
)
from penstock.quantization.codes import CodedTensor, Stored, StoredTensor

__all__ = ["CodedTensor", "Stored", "StoredTensor"]  # what leaves take, and their files import

Value = Any  # what a leaf of the same toolkit returned
Batch = Any  # what the toolkit's leaves read of a step; a composition only passes it on


class RowMap(NamedTuple):
    """Which rows of a checkpoint's tensor a part is, where they are not all of them in order."""

    num_stored: int  # rows of the tensor
    taken: NDArray[np.int64] | None = None  # [num_rows] the tensor's row that is each of ours
    is_transposed: bool = False  # the checkpoint has the matrix as [in, rows]


class Part(NamedTuple):
    """One linear map of the checkpoint: `name`.weight, [num_rows, in], and perhaps `name`.bias.

    Its rows are `num_units` equal runs (the heads of attention) that ranks never split; 0: each row
    is one. Several parts may be rows of the same tensor.
    """

    name: str
    num_rows: int
    num_units: int = 0
    rows: RowMap | None = None


class Weight(NamedTuple):
    """One tensor that a checkpoint must hold, or rows of it, and where they go."""

    name: str
    shape: tuple[int, ...]  # of what `load` takes
    load: Callable[[Stored], None]  # takes it in, converted; its name and shape are these
    duplicate_of: str | None = None  # of which weight this one is a copy: may be absent, not loaded
    rows: RowMap | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the tensor in the checkpoint."""
        if self.rows is None:
            return self.shape
        stored = (self.rows.num_stored, *self.shape[1:])
        return stored[::-1] if self.rows.is_transposed else stored


class Layer(Protocol):
    """A leaf that holds numbers. A vector that is not loaded stays: scales are 1, biases 0."""

    def weights(self) -> Iterator[Weight]:
        """Everything that a checkpoint must fill. Called before `finish`."""

    def finish(self) -> None:
        """All weights are loaded: derive what the forward pass reads. Called once."""


class Embedding(Layer, Protocol):
    """A table of one vector for each token id."""

    def __call__(self, batch: Batch) -> Value:
        """The vectors of the batch's tokens, [T, size]: the start of the residual stream."""


class Linear(Layer, Protocol):
    """y = x W^T + b, where the rows of W are those of its parts, one after the other.

    A gated one has two parts of equal size, gate and up, and returns activation(gate) * up. Ranks
    hold each a share of the rows of every part, or if it `reduces`, a share of the columns: then
    its input is such a share as well, and its output the sum over the ranks.
    """

    def __call__(self, x: Value) -> Value:
        """Map x [T, in] to [T, out]; gated: to [T, out / 2]. x may be the residual stream."""


class Norm(Layer, Protocol):
    """A norm of whole rows. It may be called at many places."""

    def __call__(self, x: Value) -> Value:
        """The norm of x [T, size], which stays as it is. x may be the residual stream."""

    def add(self, residual: Value, x: Value | None, scale: float = 1.0) -> Value:
        """Add scale * x [T, size], if any, to the residual stream in place; the norm of the sum."""

    def renew(self, residual: Value, x: Value | None) -> Value:
        """The norm of the residual stream plus x, if any, as a new residual stream."""


class SliceNorm(Layer, Protocol):
    """Norms of some runs of each row's numbers: of heads, or of a latent."""

    def __call__(self, x: Value) -> Value:
        """x with those runs normed. x is given up: it may be changed in place."""


class Rotary(Protocol):
    """Rotary positions, the NeoX pairing. One object may serve all blocks."""

    def __call__(self, x: Value, batch: Batch) -> Value:
        """Rotate heads of x by the token's position. x is given up: it may be changed in place."""


class Attention(Layer, Protocol):
    """Attention over the paged keys and values of one layer."""

    def __call__(self, qkv: Value, batch: Batch) -> Value:
        """Write the batch's keys and values, then attend: [T, H * D] of [T, (H + 2 * Hkv) * D]."""


class LatentAttention(Layer, Protocol):
    """Multi-head latent attention over the paged latents of one layer.

    Owns the map from a latent to keys and values, which is absorbed into queries and outputs.
    """

    def __call__(self, q: Value, latent: Value, batch: Batch) -> Value:
        """Write the batch's latents, then attend: [T, H * value_dim].

        Args:
            q: [T, H * (nope_dim + rope dim)], the last numbers of each head rotated.
            latent: [T, rank + rope dim], normed and rotated.
        """


class Experts(Layer, Protocol):
    """A mixture of experts, its router included."""

    def __call__(self, x: Value, shared: Value | None, shared_gate: Value | None) -> Value:
        """[T, size] of x [T, size].

        Args:
            shared: [T, size], added to what the experts give.
            shared_gate: [T, 1]: `shared` is first multiplied with its sigmoid.
        """


class Head(Layer, Protocol):
    """Scores of all token ids."""

    def __call__(self, hidden: Value) -> Value:
        """Logits [L, V] of hidden [L, size]: float32, or on a GPU the model's own format."""


class Toolkit(Protocol):
    """Makes the leaves of one model. `name` is that of the checkpoint, without `.weight`.

    All sizes and numbers of heads are those of the whole model, whatever share a rank has.
    """

    def embedding(
        self,
        name: str,
        num_rows: int,
        size: int,
        *,
        scale: float = 1.0,
        positions: PositionTable | None = None,
    ) -> Embedding:
        """A table [num_rows, size]; its vectors are multiplied with `scale`."""

    def linear(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool = False,
        activation: Activation | None = None,
        reduces: bool = False,
    ) -> Linear:
        """A map of `in_size` numbers; a gated one has an activation.

        Without ranks, `reduces` makes no difference.
        """

    def norm(self, name: str, size: int, spec: NormSpec) -> Norm:
        """A norm over `size` numbers."""

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
    ) -> SliceNorm:
        """A norm of each of `num_runs` runs of `size` numbers, the first at number `first`.

        Its scale is [size] for all of them, or not shared [num_runs, size]: as flat numbers,
        reordered by `rows`.
        """

    def rotary(
        self, spec: RopeSpec, *, first: int, num_heads: int, head_dim: int, offset: int = 0
    ) -> Rotary:
        """Rotation of `num_heads` heads of `head_dim` numbers each, the first at number `first`.

        Of each head, the `spec.dim` numbers from `offset` on are rotated.
        """

    def add(self, residual: Value, x: Value, scale: float = 1.0) -> None:
        """Add scale * x [T, size] to the residual stream in place."""

    def attention(self, kv_index: int, spec: AttentionSpec, sinks: str | None = None) -> Attention:
        """Attention over layer `kv_index` of the KV store; `sinks` is the name of its scores [H].

        `sinks` is the whole name of a tensor, without `.weight` behind it.
        """

    def latent_attention(self, kv_index: int, spec: LatentSpec, name: str) -> LatentAttention:
        """Latent attention over layer `kv_index` of the KV store.

        `name` maps a latent to keys and values: [H * (nope_dim + value_dim), rank].
        """

    def experts(self, in_size: int, spec: ExpertsSpec, names: ExpertNames) -> Experts:
        """A mixture of experts of `in_size` numbers."""

    def head(
        self,
        name: str,
        num_rows: int,
        size: int,
        tied_to: Embedding | None,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> Head:
        """A table [num_rows, size] of its own, or the embedding's.

        Scores are multiplied with `scale`, then, if there is a `softcap`, they are
        softcap * tanh(score / softcap).
        """


class PositionTable(NamedTuple):
    """Learned positions: position p adds row `first_row` + p of a table [num_rows, size].

    With `types` it adds row 0 of that table too (BERT's segments); position t * `num_rows` + p adds
    row t instead.
    """

    name: str
    num_rows: int
    first_row: int = 0
    types: str | None = None
    num_types: int = 0


class ExpertNames(NamedTuple):
    """Where a checkpoint has a mixture: `{}` in the names of an expert's maps is its number."""

    router: str
    gate: str
    up: str
    down: str
    correction: str  # the whole name of the tensor [num_experts]

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

from penstock.layers.scaling import RopeScaling

Value = Any  # what a leaf of the same toolkit returned
Batch = Any  # what the toolkit's leaves read of a step; a composition only passes it on


class StoredTensor(NamedTuple):
    """One tensor as a checkpoint holds it."""

    name: str
    dtype: str  # as safetensors names it; what reaches `Weight.load` is "F32", "F16" or "BF16"
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # its bytes, 1-D, row-major, little-endian; mapped: never to be written


class Part(NamedTuple):
    """One linear map of the checkpoint: `name`.weight, [num_rows, in], and perhaps `name`.bias.

    Its rows are `num_units` equal runs (the heads of attention) that ranks never split; 0: each row
    is one.
    """

    name: str
    num_rows: int
    num_units: int = 0


class Weight(NamedTuple):
    """One tensor that a checkpoint must hold, and where it goes."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[StoredTensor], None]  # takes it in, converted; its name and shape are these
    duplicate_of: str | None = None  # of which weight this one is a copy: may be absent, not loaded


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

    A gated one has two parts of equal size, gate and up, and returns silu(gate) * up. Ranks hold
    each a share of the rows of every part, or if it `reduces`, a share of the columns: then its
    input is such a share as well, and its output the sum over the ranks.
    """

    def __call__(self, x: Value) -> Value:
        """Map x [T, in] to [T, out]; gated: to [T, out / 2]."""


class Norm(Layer, Protocol):
    """Root mean square norm (Zhang and Sennrich 2019) of a residual sum."""

    def add(self, residual: Value, x: Value | None) -> Value:
        """Add x [T, size], if any, to the residual stream in place; return the norm of the sum."""


class Rotary(Protocol):
    """Rotary positions (Su et al. 2021), the NeoX pairing. One object serves all blocks."""

    def __call__(self, qkv: Value, batch: Batch) -> Value:
        """Rotate the query and key heads of qkv [T, (H + 2 * Hkv) * D] by the token's position.

        `qkv` is given up: it may be changed in place.
        """


class Attention(Protocol):
    """Causal attention over the paged keys and values of one layer."""

    def __call__(self, qkv: Value, batch: Batch) -> Value:
        """Write the batch's keys and values, then attend: [T, H * D] of [T, (H + 2 * Hkv) * D]."""


class Head(Layer, Protocol):
    """Scores of all token ids."""

    def __call__(self, hidden: Value) -> Value:
        """Logits [L, V] of hidden [L, size]: float32, or on a GPU the model's own format."""


class Toolkit(Protocol):
    """Makes the leaves of one model. `name` is that of the checkpoint, without `.weight`.

    All sizes and numbers of heads are those of the whole model, whatever share a rank has.
    """

    def embedding(self, name: str, num_rows: int, size: int) -> Embedding:
        """A table [num_rows, size]."""

    def linear(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool = False,
        reduces: bool = False,
    ) -> Linear:
        """A map of `in_size` numbers. Without ranks, `reduces` makes no difference."""

    def norm(self, name: str, size: int, eps: float) -> Norm:
        """A norm over `size` numbers."""

    def rotary(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
    ) -> Rotary:
        """Rotation of `head_dim` numbers by the frequencies theta ** (-2 i / head_dim), scaled."""

    def attention(
        self, kv_index: int, num_heads: int, num_kv_heads: int, head_dim: int, scale: float
    ) -> Attention:
        """Attention over layer `kv_index` of the KV store; `scale` is a factor on the scores."""

    def head(self, name: str, num_rows: int, size: int, tied_to: Embedding | None) -> Head:
        """A table [num_rows, size] of its own, or the embedding's."""

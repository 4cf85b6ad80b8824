"""What the parts of a model are, in numbers: what an architecture's file reads out of a config.

Owns the shapes and constants of norms, rotary positions, attention, MLPs and mixtures of experts.
Knows neither configs nor tensors, and imports no torch. A toolkit makes leaves of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.layers.scaling import F32, RopeScaling, frequencies

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "swiglu_oai"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """A norm by the root mean square (Zhang and Sennrich 2019), or LayerNorm."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    has_scale: bool = True  # False: nothing but the norm (OLMo 1)
    has_bias: bool = False
    offset: float = 0.0  # the scale is this plus what the checkpoint has


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions (Su et al. 2021) of the first `dim` numbers of whatever is rotated."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    # The checkpoint pairs number 2 i with 2 i + 1 (GPT-J's way) and not i with i + dim / 2. Its
    # rows are reordered when they are loaded: what computes knows the second way only.
    is_interleaved: bool = False

    def frequencies(self) -> F32:
        """Radians a position, [dim / 2]."""
        return frequencies(self.dim, self.theta, self.scaling)

    @property
    def factor(self) -> float:
        """On cosines and sines, and so on queries and on keys."""
        return 1.0 if self.scaling is None else self.scaling.angle_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al. 2023) of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # factor on the scores
    rope: RopeSpec | None  # None: no positions here
    window: int = 0  # tokens that a query sees, itself included; 0: all
    softcap: float = 0.0  # score = softcap * tanh(score / softcap); 0: as it is
    has_sinks: bool = False  # a score of each head that takes part in the softmax without a value
    has_bias: bool = False  # of the maps to queries, keys and values
    has_output_bias: bool = False
    qk_norm: NormSpec | None = None  # of queries and of keys, before they are rotated
    # head: each head is normed, one scale [D] for all; heads: a scale for each; all: one norm
    # over the numbers of all heads together.
    qk_norm_over: Literal["head", "heads", "all"] = "head"
    is_causal: bool = True  # False: a query sees all tokens of its request (encoders)

    @property
    def q_size(self) -> int:
        """Numbers in the queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Numbers in the keys of a token; as many in its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def cached(self) -> tuple[int, int]:
        """Vectors that the KV store keeps of a token, and the numbers of each."""
        return 2 * self.num_kv_heads, self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, 2024) of one layer.

    The KV store keeps one vector a token: the normed latent of keys and values, then the rotated
    part of the key that all heads share.
    """

    num_heads: int
    query_rank: int  # of the queries' own latent; 0: they are mapped at once
    rank: int  # of the latent of keys and values
    nope_dim: int  # numbers of a head's query and key that are not rotated
    value_dim: int
    scale: float
    rope: RopeSpec
    norm: NormSpec  # of the latents
    has_bias: bool = False  # of the maps down to the latents, and of the output

    @property
    def key_dim(self) -> int:
        """Numbers of a head's query."""
        return self.nope_dim + self.rope.dim

    @property
    def cached(self) -> tuple[int, int]:
        """Vectors that the KV store keeps of a token, and the numbers of each."""
        return 1, self.rank + self.rope.dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """down(activation(gate(x)) * up(x)), Shazeer 2020; without a gate down(activation(up(x)))."""

    size: int
    activation: Activation
    is_gated: bool = True
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSpec:
    """Scores of labels from one pooled vector: output(tanh(dense(x))), or output(x).

    `dense` and `output` are names in a checkpoint; a dense map has a bias.
    """

    num_labels: int
    output: str
    has_bias: bool
    dense: str = ""  # "": there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A mixture of gated MLPs of which each token takes some (Shazeer et al. 2017).

    softmax, sigmoid: scores of all experts, of which the largest are chosen; softmax_chosen: the
    largest logits are chosen, softmax over those. With a correction, score + correction chooses
    and score alone is the factor. With groups, only experts of the `top_groups` best groups can be
    chosen; a group is as good as its best expert (`group_top` 1) or its best two together (2).
    """

    num_experts: int
    top_k: int
    size: int  # of an expert's middle
    activation: Activation
    scoring: Literal["softmax", "sigmoid", "softmax_chosen"] = "softmax"
    is_normalised: bool = False  # factors of a token are divided by their sum
    scale: float = 1.0  # on the factors
    has_correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 1
    has_bias: bool = False  # of the experts
    has_router_bias: bool = False
    shared_size: int = 0  # of the MLP that every token takes beside them; 0: there is none
    has_shared_gate: bool = False  # it is multiplied with sigmoid(gate(x))

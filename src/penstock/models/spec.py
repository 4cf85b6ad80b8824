"""What a model is: shapes, constants, and under which names a checkpoint has its weights.

Owns `ModelSpec`, which an architecture's file (`models/architectures/`) reads out of a config.
Knows no weights and no files, and imports no torch: what a model needs is known before anything
is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from penstock.layers.specs import (
    AttentionSpec,
    ClassifierSpec,
    ExpertsSpec,
    LatentSpec,
    MLPSpec,
    NormSpec,
)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # by dtype

# Where the norms of a block are, and what they norm.
# pre: before attention and before the MLP. sandwich: and behind each, before the sum (Gemma 2).
# post: only behind each, before the sum (OLMo 2). parallel: attention and MLP side by side, from
# the same stream (GPT-J). encoder: behind each sum, which makes a new stream (BERT).
Arrangement = Literal["pre", "sandwich", "post", "parallel", "encoder"]
# How the rows of a joined map of queries, keys and values lie in a checkpoint.
# stacked: all queries, all keys, all values. heads: each head's three, one after the other (GPT-
# NeoX). groups: each KV head's queries, its key and its value (Falcon).
Joined = Literal["stacked", "heads", "groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names in a checkpoint, those of a block without the block's own; the default are Llama's."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    token_types: str = ""
    embedding_norm: str = ""  # of the sum of embeddings (BERT)
    final_norm: str = "model.norm"
    head: str = "lm_head"
    block: str = "model.layers.{}"

    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""  # if the three are one
    qkv_rows: Joined = "stacked"
    output: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    after_attention: str = ""  # the norm behind it

    query_down: str = "self_attn.q_a_proj"
    query_down_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    latent_down: str = "self_attn.kv_a_proj_with_mqa"
    latent_norm: str = "self_attn.kv_a_layernorm"
    latent_up: str = "self_attn.kv_b_proj"

    mlp_norm: str = "post_attention_layernorm"  # parallel: "" is that of attention
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = ""  # if the two are one
    down: str = "mlp.down_proj"
    after_mlp: str = ""  # the norm behind it

    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"
    expert: str = "mlp.experts.{}"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"

    is_transposed: bool = False  # matrices of blocks are [in, out] (GPT-2's Conv1D)
    # (ours, theirs): there are checkpoints whose names begin with `theirs` where ours, above, begin
    # with `ours`.
    prefixes: tuple[tuple[str, str], ...] = ()
    # Names that begin so are other parts of a model of which this is the text part.
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One block."""

    attention: AttentionSpec | LatentSpec
    mlp: MLPSpec | ExpertsSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and constants of a transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_context_len: int
    tied_embeddings: bool
    dtype: str  # what the checkpoint says its weights are: a key of ITEM_BYTES
    names: Names = Names()
    arrangement: Arrangement = "pre"
    has_final_norm: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add to the stream
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    has_head_bias: bool = False
    num_positions: int = 0  # rows of a table of learned positions
    first_position: int = 0  # the row of position 0
    num_token_types: int = 0  # a token of type t is t * num_positions further on
    has_head: bool = True  # False: it has no scores of tokens
    is_foreign: bool = False  # transformers' own modules compute it; sizes of MLPs are a guess
    classifier: ClassifierSpec | None = None  # it has scores of labels instead

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a config as Hugging Face writes it, by the file of its architecture.

        Raises:
            UnsupportedModel: the architecture is not known, or a key is missing, has the wrong
                type or a value that is not implemented; the message names the key.
        """
        from penstock.models.registry import read_spec  # which knows the files that know this one

        return read_spec(config)

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of a layer: the most."""
        return max(layer.attention.num_heads for layer in self.layers)

    @property
    def cached(self) -> tuple[int, int]:
        """Vectors that a layer of the KV store keeps of a token, and the numbers of each."""
        return self.layers[0].attention.cached

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys; of latents one."""
        return (self.cached[0] + 1) // 2

    @property
    def head_dim(self) -> int:
        """Numbers of a vector in the KV store."""
        return self.cached[1]

    @property
    def is_encoder(self) -> bool:
        """Whether it maps whole texts to vectors and writes none."""
        attention = self.layers[0].attention
        return isinstance(attention, AttentionSpec) and not attention.is_causal

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights; tied tables count once."""
        from penstock.models.shapes import shapes_of  # which runs what builds models

        return shapes_of(self).num_parameters

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token in the KV store; int8 and fp8 have a float32 scale for each vector."""
        num_vectors, size = self.cached
        is_scaled = dtype in {"int8", "fp8"}
        vector_bytes = size + 4 if is_scaled else size * ITEM_BYTES[dtype]
        return self.num_layers * num_vectors * vector_bytes

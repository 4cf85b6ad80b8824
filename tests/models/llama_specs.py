"""Specs of Llama's kin by flat numbers."""

from __future__ import annotations

from typing import Any

from tests.models.configs import CONFIGS

from penstock.layers.specs import AttentionSpec, MLPSpec
from penstock.models.spec import ModelSpec

_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tied_embeddings": "tie_word_embeddings",
}

SMALL = ModelSpec.from_hf(
    CONFIGS["LlamaForCausalLM"]["mlp_bias"]
    | {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
)


def changed(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """A spec like one of Llama's kin, with other numbers, by the names below."""
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    assert isinstance(attention, AttentionSpec)
    assert isinstance(mlp, MLPSpec)
    assert attention.rope is not None
    numbers: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": mlp.size,
        "num_layers": spec.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.has_bias,
        "mlp_bias": mlp.has_bias,
        "tied_embeddings": spec.tied_embeddings,
    } | changes
    return ModelSpec.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": spec.max_context_len,
            "rms_norm_eps": spec.norm.eps,
            "rope_theta": attention.rope.theta,
        }
        | {_KEYS.get(name, name): value for name, value in numbers.items()}
    )

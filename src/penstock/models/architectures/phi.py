"""Phi 1, 1.5 and 2 (Gunasekar et al. 2023)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a PhiForCausalLM's config."""
    config.refuse("qk_layernorm")
    num_heads, num_kv_heads, head_dim = config.heads()
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, share=0.5),
            has_bias=True,
            has_output_bias=True,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "gelu_new"),
            is_gated=False,
            has_bias=True,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("layer_norm_eps", 1e-5), kind="layer", has_bias=True),
        max_context_len=config.size("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(
            final_norm="model.final_layernorm",
            output="self_attn.dense",
            mlp_norm="",
            up="mlp.fc1",
            down="mlp.fc2",
        ),
        arrangement="parallel",
        has_head_bias=True,
    )

"""Granite 3 (IBM 2024): Llama with factors on embeddings, scores, sums and logits."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """Read a GraniteForCausalLM's config."""
    num_heads, num_kv_heads, head_dim = config.heads()
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=config.factor("attention_multiplier", 1.0),
            rope=config.rope(head_dim),
            has_bias=has_bias,
            has_output_bias=has_bias,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "silu"),
            has_bias=config.flag("mlp_bias"),
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-6)),
        max_context_len=config.size("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        embedding_scale=config.factor("embedding_multiplier", 1.0),
        residual_scale=config.factor("residual_multiplier", 1.0),
        logit_scale=1.0 / config.factor("logits_scaling", 1.0),
    )

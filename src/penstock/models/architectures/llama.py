"""Llama (Touvron et al. 2023, Dubey et al. 2024)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import MAX_LAYERS, ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """Read a LlamaForCausalLM's config."""
    config.refuse(
        "attention_sinks",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "logit_scale",
        "num_experts",
        "num_local_experts",
        "rope_interleaved",
        "sliding_window",
        "use_qk_norm",
    )
    num_heads, num_kv_heads, head_dim = config.heads()
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
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
        layers=(layer,) * config.size("num_hidden_layers", high=MAX_LAYERS),
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-6)),
        max_context_len=config.size("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
    )

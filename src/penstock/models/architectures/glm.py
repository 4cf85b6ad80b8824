"""GLM-4 of 2024 (`GlmForCausalLM`) and of 2025 (`Glm4ForCausalLM`), Zeng et al. 2024."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a GlmForCausalLM's config or a Glm4ForCausalLM's, which norms behind as well."""
    is_sandwich = config.architecture == "Glm4ForCausalLM"
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=2, head_dim=128)
    config = config.filled(max_position_embeddings=131072)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, share=0.5, is_interleaved=True),
            has_bias=config.flag("attention_bias", True),
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "silu"),
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1.5625e-7)),
        max_context_len=config.size("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(
            gate_up="mlp.gate_up_proj",
            after_attention="post_self_attn_layernorm" if is_sandwich else "",
            after_mlp="post_mlp_layernorm" if is_sandwich else "",
        ),
        arrangement="sandwich" if is_sandwich else "pre",
    )

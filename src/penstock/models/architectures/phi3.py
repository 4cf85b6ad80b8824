"""Phi 3, 3.5 and 4 (Abdin et al. 2024), the mini models among them: Llama with joined maps."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a Phi3ForCausalLM's config."""
    config.refuse("attention_bias", "mlp_bias", "lm_head_bias")
    num_heads, num_kv_heads, head_dim = config.heads()
    max_context_len = config.size("max_position_embeddings", 4096)
    config = config.filled(
        max_position_embeddings=max_context_len, original_max_position_embeddings=4096
    )
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, share=1.0),
            window=config.window(None, max_context_len),
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
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-5)),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    )

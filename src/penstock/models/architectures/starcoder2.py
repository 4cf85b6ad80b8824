"""StarCoder 2 (Lozhkov et al. 2024)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a Starcoder2ForCausalLM's config."""
    config.expect("norm_type", "layer_norm")
    config.expect("mlp_type", "default")
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=2)
    has_bias = config.flag("use_bias", True)
    max_context_len = config.size("max_position_embeddings", 4096)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim),
            window=config.window(None, max_context_len),
            has_bias=has_bias,
            has_output_bias=has_bias,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
            is_gated=False,
            has_bias=has_bias,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("norm_epsilon", 1e-5), kind="layer", has_bias=True),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=Names(up="mlp.c_fc", down="mlp.c_proj"),
    )

"""Nemotron 4 and Minitron (NVIDIA 2024)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """Read a NemotronForCausalLM's config. Its checkpoints hold scales of norms less one."""
    num_heads, num_kv_heads, head_dim = config.heads()
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, share=0.5),
            has_bias=has_bias,
            has_output_bias=has_bias,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "relu2"),
            is_gated=False,
            has_bias=config.flag("mlp_bias"),
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("norm_eps", 1e-5), kind="layer", has_bias=True, offset=1.0),
        max_context_len=config.size("max_position_embeddings", 4096),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
    )

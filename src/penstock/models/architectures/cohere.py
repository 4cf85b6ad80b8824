"""Command-R (Cohere 2024), and Command-R7B and Command-A, which mix windows with full layers."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a CohereForCausalLM's config or a Cohere2ForCausalLM's."""
    config.expect("position_embedding_type", "rope_gptj")
    config.expect("rotary_pct", 1.0)
    config.expect("use_gated_activation", True)
    config.expect("use_parallel_block", True)
    is_second = config.architecture == "Cohere2ForCausalLM"
    num_heads, num_kv_heads, head_dim = config.heads()
    has_bias = config.flag("attention_bias")
    norm = NormSpec(eps=config.factor("layer_norm_eps", 1e-5), kind="layer")
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=config.rope(head_dim, theta=1e4 if is_second else 5e5, is_interleaved=True),
        has_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm=norm if config.flag("use_qk_norm") and not is_second else None,
        qk_norm_over="heads",
    )
    max_context_len = config.size("max_position_embeddings", 8192)
    attentions = (attention,) * config.num_layers
    if is_second:
        attentions = _windows(config, attention, max_context_len)
    mlp = MLPSpec(
        size=config.size("intermediate_size"), activation=config.activation("hidden_act", "silu")
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(LayerSpec(attention=attention, mlp=mlp) for attention in attentions),
        norm=norm,
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=Names(mlp_norm=""),
        arrangement="parallel",
        logit_scale=config.factor("logit_scale", 0.0625),
    )


def _windows(
    config: ConfigReader, attention: AttentionSpec, max_context_len: int
) -> tuple[AttentionSpec, ...]:
    """Layers with a window, and every fourth one without a window and without positions."""
    config.refuse("use_qk_norm")
    config.expect("order_of_interleaved_layers", "local_attn_first")
    pattern = config.size("sliding_window_pattern", 4)
    slides = config.slides(config.num_layers, lambda index: (index + 1) % pattern != 0)
    window = config.window(4096, max_context_len, slides)
    return tuple(
        replace(attention, window=window) if is_sliding else replace(attention, rope=None)
        for is_sliding in slides
    )

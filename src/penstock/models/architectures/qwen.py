"""Qwen 2, 2.5 (Yang et al. 2024) and 3 (2025): Llama with biases, or with normed heads."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a Qwen2ForCausalLM's config or a Qwen3ForCausalLM's."""
    config.refuse("use_mrope", "mlp_bias")
    is_third = config.architecture == "Qwen3ForCausalLM"
    num_heads, num_kv_heads, head_dim = config.heads(
        num_kv_heads=32, head_dim=128 if is_third else None
    )
    has_bias = config.flag("attention_bias") if is_third else True
    max_context_len = config.size("max_position_embeddings", 32768)
    slides, window = windows(config, max_context_len)
    norm = NormSpec(eps=config.factor("rms_norm_eps", 1e-6))
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=config.rope(head_dim),
        has_bias=has_bias,
        has_output_bias=has_bias and is_third,
        qk_norm=norm if is_third else None,
    )
    mlp = MLPSpec(
        size=config.size("intermediate_size"), activation=config.activation("hidden_act", "silu")
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(attention=replace(attention, window=window if is_sliding else 0), mlp=mlp)
            for is_sliding in slides
        ),
        norm=norm,
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(prefixes=(("model.", ""),)),  # as embedding models have been saved
    )


def windows(config: ConfigReader, max_context_len: int) -> tuple[tuple[bool, ...], int]:
    """Which layers have a window, and how many tokens it has: layers from some index on."""
    uses_window = config.flag("use_sliding_window")
    has_window = uses_window and config.optional("sliding_window", 4096) is not None
    first = config.count("max_window_layers", 28)
    slides = config.slides(config.num_layers, lambda index: has_window and index >= first)
    if any(slides) and not uses_window:
        raise config.error("layer_types", "without windows, because `use_sliding_window` is false")
    return slides, config.window(4096, max_context_len, slides)

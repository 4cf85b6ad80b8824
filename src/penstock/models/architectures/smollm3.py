"""SmolLM3 (Hugging Face 2025): Llama in which some layers have no positions."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """Read a SmolLM3ForCausalLM's config."""
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=4)
    num_layers = config.num_layers
    max_context_len = config.size("max_position_embeddings", 32768)
    has_rope = _has_rope(config, num_layers)
    uses_window = config.flag("use_sliding_window") and config.has("sliding_window")
    slides = config.slides(num_layers, lambda index: uses_window and not has_rope[index])
    window = config.window(None, max_context_len, slides) if uses_window else 0
    if any(slides) and not uses_window:
        raise config.error("layer_types", "without windows, because `use_sliding_window` is false")
    has_bias = config.flag("attention_bias")
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=config.rope(head_dim, theta=2e6),
        has_bias=has_bias,
        has_output_bias=has_bias,
    )
    mlp = MLPSpec(
        size=config.size("intermediate_size"),
        activation=config.activation("hidden_act", "silu"),
        has_bias=config.flag("mlp_bias"),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(
                attention=replace(
                    attention,
                    rope=attention.rope if rotates else None,
                    window=window if is_sliding else 0,
                ),
                mlp=mlp,
            )
            for rotates, is_sliding in zip(has_rope, slides, strict=True)
        ),
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-6)),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
    )


def _has_rope(config: ConfigReader, num_layers: int) -> list[bool]:
    """By layer: `no_rope_layers` has 1 for those that do rotate."""
    if not config.has("no_rope_layers"):
        interval = config.size("no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    flags = config.value(list, "no_rope_layers")
    if len(flags) != num_layers or not all(flag in (0, 1) for flag in flags):
        raise config.error("no_rope_layers", f"a list of `{num_layers}` zeros and ones")
    return [bool(flag) for flag in flags]

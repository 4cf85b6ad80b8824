"""EXAONE 4 (LG AI Research 2025): norms behind, normed heads, no positions in full layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read an Exaone4ForCausalLM's config. Without a window all layers see everything, rotated."""
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=32)
    max_context_len = config.size("max_position_embeddings", 2048)
    norm = NormSpec(eps=config.factor("rms_norm_eps", 1e-5))
    is_mixed = config.optional("sliding_window", 4096) is not None
    slides = config.slides(config.num_layers, _pattern(config) if is_mixed else lambda _: False)
    window = config.window(4096, max_context_len, slides)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=config.rope(head_dim),
        qk_norm=norm,
    )
    mlp = MLPSpec(
        size=config.size("intermediate_size"), activation=config.activation("hidden_act", "silu")
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(
                attention=replace(
                    attention,
                    rope=attention.rope if is_sliding or not is_mixed else None,
                    window=window if is_sliding else 0,
                ),
                mlp=mlp,
            )
            for is_sliding in slides
        ),
        norm=norm,
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(
            after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"
        ),
        arrangement="post",
    )


def _pattern(config: ConfigReader) -> Callable[[int], bool]:
    """Which layers slide: all but every n-th, or by letters: L those that do, G those that not."""
    key = "sliding_window_pattern"
    if not config.has(key) or config.is_a(int, key):
        every = config.size(key, 4)
        return lambda index: (index + 1) % every != 0
    letters = config.value(str, key)
    if not letters or set(letters) - {"L", "G"}:
        raise config.error(key, "a positive integer, or letters `L` and `G`")
    return lambda index: letters[index % len(letters)] == "L"

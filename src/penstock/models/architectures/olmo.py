"""OLMo 1, 2 and 3 (Groeneveld et al. 2024, OLMo Team 2025)."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.rope import FULL, SLIDING, RopeDefaults, read_rope
from penstock.models.spec import LayerSpec, ModelSpec, Names

_BEHIND = Names(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")


def read(config: ConfigReader) -> ModelSpec:
    """Read the config of any OLMo.

    The first norms without a scale; since the second, norms are behind attention and MLP, and
    queries and keys are normed over all heads together. The third has windows.
    """
    if config.architecture == "OlmoForCausalLM":
        config.refuse("clip_qkv")
        norm = NormSpec(eps=1e-5, kind="layer", has_scale=False)
        spec = _spec(config, norm)
        return replace(spec, arrangement="pre", names=Names())
    norm = NormSpec(eps=config.factor("rms_norm_eps", 1e-5))
    spec = _spec(config, norm)
    if config.architecture == "Olmo3ForCausalLM":
        return replace(spec, layers=_windows(config, spec))
    return spec


def _spec(config: ConfigReader, norm: NormSpec) -> ModelSpec:
    """All but what tells layers of the third from each other."""
    num_heads, num_kv_heads, head_dim = config.heads()
    has_bias = config.flag("attention_bias")
    has_kinds = config.architecture == "Olmo3ForCausalLM"
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=None if has_kinds else config.rope(head_dim),
            has_bias=has_bias,
            has_output_bias=has_bias,
            qk_norm=norm if norm.has_scale else None,
            qk_norm_over="all",
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
        norm=norm,
        max_context_len=config.size("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=_BEHIND,
        arrangement="post",
    )


def _windows(config: ConfigReader, spec: ModelSpec) -> tuple[LayerSpec, ...]:
    """Three layers with a window, then one without; only that one's RoPE is stretched."""
    config = config.filled(max_position_embeddings=spec.max_context_len)
    slides = config.slides(spec.num_layers, lambda index: (index + 1) % 4 != 0)
    window = config.window(4096, spec.max_context_len, slides)
    layer, attention = spec.layers[0], spec.layers[0].attention
    assert isinstance(attention, AttentionSpec)
    kinds = {
        is_sliding: replace(
            attention,
            rope=read_rope(
                config,
                attention.head_dim,
                RopeDefaults(theta=5e5),
                kind=SLIDING if is_sliding else FULL,
            ),
            window=window if is_sliding else 0,
        )
        for is_sliding in set(slides)
    }
    return tuple(replace(layer, attention=kinds[is_sliding]) for is_sliding in slides)

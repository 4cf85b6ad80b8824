"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025)."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec, RopeSpec
from penstock.models.config import ConfigReader
from penstock.models.rope import FULL, SLIDING, RopeDefaults, read_rope
from penstock.models.spec import LayerSpec, ModelSpec, Names

_SANDWICH = Names(
    after_attention="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
# The part of a Gemma 3 that reads and writes text, in a checkpoint that also has one for images.
_TEXT = "language_model.model."
_TEXT_NAMES = replace(
    _SANDWICH,
    embedding=f"{_TEXT}embed_tokens",
    final_norm=f"{_TEXT}norm",
    head="language_model.lm_head",
    block=f"{_TEXT}layers.{{}}",
    prefixes=((_TEXT, "model.language_model."), ("language_model.lm_head.", "lm_head.")),
    ignored=("vision_", "multi_modal_projector.", "model.vision_", "model.multi_modal_projector."),
)
_TEXT_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
_ROPES = {
    FULL: RopeDefaults(theta=1e6),
    SLIDING: RopeDefaults(theta=1e4, theta_key="rope_local_base_freq"),
}


def read(config: ConfigReader) -> ModelSpec:
    """Read the config of any Gemma; of a Gemma3ForConditionalGeneration the text part."""
    if config.architecture == "GemmaForCausalLM":
        return _read_first(config)
    if config.architecture == "Gemma2ForCausalLM":
        return _read_second(config)
    if config.architecture == "Gemma3ForCausalLM":
        return _read_third(config)
    text = config.part("text_config").filled(**_TEXT_SIZES)  # published ones leave them out
    return replace(_read_third(text), names=_TEXT_NAMES)


def _read_first(config: ConfigReader) -> ModelSpec:
    # Published configs say `gelu` and mean the tanh of `hidden_activation`, as transformers does.
    activation = config.activation("hidden_act", "gelu_pytorch_tanh")
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=16, head_dim=256)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim),
            has_bias=config.flag("attention_bias"),
            has_output_bias=config.flag("attention_bias"),
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation="gelu_tanh" if activation == "gelu" else activation,
        ),
    )
    spec = _spec(config, [layer] * config.num_layers, max_context_len=8192)
    return replace(spec, arrangement="pre", names=Names(), logit_softcap=0.0)


def _read_second(config: ConfigReader) -> ModelSpec:
    attention, mlp = _layer(config, softcap=config.optional_factor("attn_logit_softcapping", 50.0))
    slides = config.slides(config.num_layers, lambda index: index % 2 == 0)
    window = config.window(4096, config.size("max_position_embeddings", 8192), slides)
    attention = replace(attention, rope=config.rope(attention.head_dim))
    layers = [
        LayerSpec(attention=replace(attention, window=window if is_sliding else 0), mlp=mlp)
        for is_sliding in slides
    ]
    return _spec(config, layers, max_context_len=8192, softcap=30.0)


def _read_third(config: ConfigReader) -> ModelSpec:
    config.refuse("attn_logit_softcapping")
    attention, mlp = _layer(config)
    pattern = config.size("sliding_window_pattern", config.size("_sliding_window_pattern", 6))
    slides = config.slides(config.num_layers, lambda index: (index + 1) % pattern != 0)
    window = config.window(4096, config.size("max_position_embeddings", 2**17), slides)
    kinds = {
        is_sliding: replace(
            attention,
            rope=_rope(config, attention.head_dim, SLIDING if is_sliding else FULL),
            window=window if is_sliding else 0,
            qk_norm=_norm(config),
        )
        for is_sliding in set(slides)
    }
    layers = [LayerSpec(attention=kinds[is_sliding], mlp=mlp) for is_sliding in slides]
    return _spec(config, layers, max_context_len=2**17)


def _rope(config: ConfigReader, head_dim: int, kind: str) -> RopeSpec:
    return read_rope(config, head_dim, _ROPES[kind], kind=kind)


def _norm(config: ConfigReader) -> NormSpec:
    return NormSpec(eps=config.factor("rms_norm_eps", 1e-6), offset=1.0)


def _layer(config: ConfigReader, softcap: float = 0.0) -> tuple[AttentionSpec, MLPSpec]:
    """What all layers of a Gemma 2 or 3 share."""
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=4, head_dim=256)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=config.factor("query_pre_attn_scalar", 256.0) ** -0.5,
        rope=None,
        softcap=softcap,
        has_bias=config.flag("attention_bias"),
        has_output_bias=config.flag("attention_bias"),
    )
    mlp = MLPSpec(
        size=config.size("intermediate_size"),
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
    )
    return attention, mlp


def _spec(
    config: ConfigReader, layers: list[LayerSpec], *, max_context_len: int, softcap: float = 0.0
) -> ModelSpec:
    config.refuse("use_bidirectional_attention")
    hidden_size = config.size("hidden_size")
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(layers),
        norm=_norm(config),
        max_context_len=config.size("max_position_embeddings", max_context_len),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=_SANDWICH,
        arrangement="sandwich",
        embedding_scale=hidden_size**0.5,
        logit_softcap=config.optional_factor("final_logit_softcapping", softcap),
    )

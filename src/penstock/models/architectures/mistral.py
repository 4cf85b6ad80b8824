"""Mistral (Jiang et al. 2023) and Ministral: Llama with a window."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

# The part of a Mistral 3 that reads and writes text, in a checkpoint that also has a part for
# images. Where neither config speaks of `tie_word_embeddings`, as in Small 3.1, it has a head of
# its own, whatever the class of transformers takes for granted.
_TEXT = "language_model."
_TEXT_NAMES = Names(
    embedding=f"{_TEXT}model.embed_tokens",
    final_norm=f"{_TEXT}model.norm",
    head=f"{_TEXT}lm_head",
    block=f"{_TEXT}model.layers.{{}}",
    prefixes=((f"{_TEXT}model.", f"model.{_TEXT}"), (f"{_TEXT}lm_head.", "lm_head.")),
    ignored=("vision_", "multi_modal_projector.", "model.vision_", "model.multi_modal_projector."),
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a MistralForCausalLM's config, a MinistralForCausalLM's or a Ministral3ForCausalLM's.

    Of a Mistral3ForConditionalGeneration the text part. Ministral 3 scales its queries from
    position `original_max_position_embeddings` on (`llama_4_scaling_beta`), which no backend here
    does: its context ends there.
    """
    if config.architecture == "Mistral3ForConditionalGeneration":
        text = config.part("text_config")
        text.expect("model_type", "mistral", "ministral3")
        is_third = text.value(str, "model_type", "mistral") == "ministral3"
        return replace(_read(text, is_third=is_third), names=_TEXT_NAMES)
    return _read(config, is_third=config.architecture == "Ministral3ForCausalLM")


def _read(config: ConfigReader, *, is_third: bool) -> ModelSpec:
    is_mixed = config.architecture == "MinistralForCausalLM"
    config.refuse("attention_bias", "mlp_bias", *(() if is_mixed else ("layer_types",)))
    num_heads, num_kv_heads, head_dim = config.heads(
        num_kv_heads=8, head_dim=128 if is_third else None
    )
    max_context_len = config.size("max_position_embeddings", 2**18 if is_third else 2**17)
    rope = config.section("rope_parameters") or config.section("rope_scaling")
    if is_third and rope is None:
        raise config.error("rope_parameters", "an object")
    if rope is not None and rope.has("llama_4_scaling_beta"):
        max_context_len = min(max_context_len, rope.size("original_max_position_embeddings"))
    default = None if is_third else 4096
    slides = config.slides(
        config.num_layers, lambda _: config.optional("sliding_window", default) is not None
    )
    window = config.window(default, max_context_len, slides)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=config.rope(head_dim),
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
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-5 if is_third else 1e-6)),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
    )

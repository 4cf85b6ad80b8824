"""Qwen1.5- and Qwen2-MoE, Qwen3-MoE, OLMoE (2024, 2025): many small experts."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, ExpertsSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read the config of a Qwen2MoeForCausalLM, Qwen3MoeForCausalLM or OlmoeForCausalLM."""
    name = config.architecture
    is_qwen2, is_olmo = name == "Qwen2MoeForCausalLM", name == "OlmoeForCausalLM"
    config.refuse("clip_qkv")
    eps = config.factor("rms_norm_eps", 1e-5 if is_olmo else 1e-6)
    num_layers = config.num_layers
    max_context_len = config.size("max_position_embeddings", 4096 if is_olmo else 32768)
    slides, window = _windows(config, num_layers, max_context_len)
    has_bias = config.flag("qkv_bias", True) if is_qwen2 else config.flag("attention_bias")
    num_heads, num_kv_heads, head_dim = config.heads(
        num_kv_heads=None if is_olmo else 16 if is_qwen2 else 4
    )
    sparse = _sparse_layers(config, num_layers)
    experts = _experts(config, is_qwen2=is_qwen2, is_olmo=is_olmo)
    dense = MLPSpec(
        size=config.size("intermediate_size"), activation=config.activation("hidden_act", "silu")
    )
    return ModelSpec(
        architecture=name,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(
                attention=AttentionSpec(
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    scale=head_dim**-0.5,
                    rope=config.rope(head_dim),
                    window=window if is_sliding else 0,
                    has_bias=has_bias,
                    has_output_bias=has_bias and not is_qwen2,
                    qk_norm=None if is_qwen2 else NormSpec(eps=eps),
                    qk_norm_over="all" if is_olmo else "head",
                ),
                mlp=experts if is_sparse else dense,
            )
            for is_sliding, is_sparse in zip(slides, sparse, strict=True)
        ),
        norm=NormSpec(eps=eps),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(shared="mlp.shared_expert"),
    )


def _experts(config: ConfigReader, *, is_qwen2: bool, is_olmo: bool) -> ExpertsSpec:
    key = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    num_experts = config.size(key, 60 if is_qwen2 else 64 if is_olmo else 128)
    size_key = "intermediate_size" if is_olmo else "moe_intermediate_size"
    return ExpertsSpec(
        num_experts=num_experts,
        top_k=config.top_k(num_experts, 4 if is_qwen2 else 8),
        size=config.size(size_key),
        activation=config.activation("hidden_act", "silu"),
        is_normalised=config.flag("norm_topk_prob"),
        shared_size=config.size("shared_expert_intermediate_size", 5632) if is_qwen2 else 0,
        has_shared_gate=is_qwen2,
    )


def _sparse_layers(config: ConfigReader, num_layers: int) -> list[bool]:
    """Which blocks have experts; the others have an MLP."""
    every = config.size("decoder_sparse_step", 1)
    dense = config.value(list, "mlp_only_layers", [])
    return [index not in dense and (index + 1) % every == 0 for index in range(num_layers)]


def _windows(
    config: ConfigReader, num_layers: int, max_context_len: int
) -> tuple[tuple[bool, ...], int]:
    """Which blocks have a sliding window, and its length: Qwen3-MoE's all of them.

    Of a Qwen2-MoE without `layer_types` releases of transformers say different things.
    """
    uses_window = config.flag("use_sliding_window")
    if uses_window and config.architecture == "OlmoeForCausalLM":
        raise config.error("use_sliding_window", "absent or false")
    is_open = config.architecture == "Qwen2MoeForCausalLM" and not config.has("layer_types")
    if uses_window and is_open:
        raise config.error("use_sliding_window", "false where `layer_types` is absent")
    slides = config.slides(num_layers, lambda _: uses_window)
    if any(slides) and not uses_window:
        raise config.error("layer_types", "without windows, because `use_sliding_window` is false")
    if not uses_window:
        return slides, 0
    return slides, config.window(4096, max_context_len, slides)

"""GPT-OSS (OpenAI 2025): experts with a clipped SwiGLU, attention sinks, every other a window."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, ExpertsSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_ALPHA, _LIMIT = 1.702, 7.0  # of the activation, which has them built in
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(config: ConfigReader) -> ModelSpec:
    """Read a GptOssForCausalLM's config."""
    config.expect("hidden_act", "silu")
    config.expect("swiglu_alpha", _ALPHA)
    config.expect("swiglu_limit", _LIMIT)
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=8, head_dim=64)
    max_context_len = config.size("max_position_embeddings", 131072)
    num_experts = config.size("num_local_experts", 128)
    slides = config.slides(config.num_layers, lambda index: (index + 1) % 2 == 1)
    window = config.window(128, max_context_len, slides)
    has_bias = config.flag("attention_bias", True)
    if not config.has("rope_scaling"):
        config = config.filled(rope_parameters=_ROPE)
    rope = config.filled(max_position_embeddings=max_context_len).rope(head_dim, theta=150000.0)
    experts = ExpertsSpec(
        num_experts=num_experts,
        top_k=config.top_k(num_experts, 4),
        size=config.size("intermediate_size"),
        activation="swiglu_oai",
        scoring="softmax_chosen",
        has_bias=True,
        has_router_bias=True,
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(
                attention=AttentionSpec(
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    scale=head_dim**-0.5,
                    rope=rope,
                    window=window if is_sliding else 0,
                    has_sinks=True,
                    has_bias=has_bias,
                    has_output_bias=has_bias,
                ),
                mlp=experts,
            )
            for is_sliding in slides
        ),
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-5)),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(router="mlp.router"),
    )

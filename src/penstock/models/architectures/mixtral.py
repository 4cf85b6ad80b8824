"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in every block."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, ExpertsSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

NAMES = Names(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}",
    expert_gate="w1",
    expert_up="w3",
    expert_down="w2",
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a MixtralForCausalLM's config."""
    num_heads, num_kv_heads, head_dim = config.heads(num_kv_heads=8)
    max_context_len = config.size("max_position_embeddings", 4096 * 32)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, theta=1e6),
            window=config.window(None, max_context_len),
        ),
        mlp=ExpertsSpec(
            num_experts=config.size("num_local_experts", 8),
            top_k=config.top_k(config.size("num_local_experts", 8), 2),
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "silu"),
            is_normalised=True,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-5)),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=NAMES,
    )

"""StableLM 2 and 3B (Stability AI 2023)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


def read(config: ConfigReader) -> ModelSpec:
    """Read a StableLmForCausalLM's config. `qk_layernorm` (of 12B) is refused."""
    config.refuse("qk_layernorm")
    num_heads, head_dim = config.equal_heads("hidden_size", "num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", 32)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of `{num_heads}`")
    is_parallel = config.flag("use_parallel_residual")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, share=0.25),
            has_bias=config.flag("use_qkv_bias"),
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
        norm=NormSpec(eps=config.factor("layer_norm_eps", 1e-5), kind="layer", has_bias=True),
        max_context_len=config.size("max_position_embeddings", 4096),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=Names(mlp_norm="") if is_parallel else Names(),
        arrangement="parallel" if is_parallel else "pre",
    )

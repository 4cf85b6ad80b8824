"""Falcon (Almazrouei et al. 2023): the old decoder of 7B, and the new one of 11B, 40B and 180B."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_NAMES = Names(
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    block="transformer.h.{}",
    qkv="self_attention.query_key_value",
    qkv_rows="groups",
    output="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a FalconForCausalLM's config. With alibi (falcon-rw) it is refused."""
    config.refuse("alibi", "apply_residual_connection_post_layernorm")
    num_heads, head_dim = config.equal_heads("hidden_size", "num_attention_heads")
    is_new = config.flag("new_decoder_architecture")
    num_kv_heads = num_heads
    if is_new:
        num_kv_heads = config.size("num_kv_heads", num_heads)
        if num_heads % num_kv_heads:
            raise config.error("num_kv_heads", f"a divisor of `{num_heads}`")
    elif config.flag("multi_query", True):
        num_kv_heads = 1
    has_bias = config.flag("bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim),
            has_bias=has_bias,
            has_output_bias=has_bias,
        ),
        mlp=MLPSpec(
            size=config.size("ffn_hidden_size", 4 * config.size("hidden_size")),
            activation=config.activation("activation", "gelu"),
            is_gated=False,
            has_bias=has_bias,
        ),
    )
    is_parallel = config.flag("parallel_attn", True)
    if is_new and not is_parallel:
        raise config.error("parallel_attn", "true with `new_decoder_architecture`")
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("layer_norm_epsilon", 1e-5), kind="layer", has_bias=True),
        max_context_len=config.size("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=_norm_names(config, is_new=is_new, is_parallel=is_parallel),
        arrangement="parallel" if is_parallel else "pre",
    )


def _norm_names(config: ConfigReader, *, is_new: bool, is_parallel: bool) -> Names:
    num_norms = config.size("num_ln_in_parallel_attn", 2 if is_new else 1)
    if num_norms > (2 if is_new else 1):
        raise config.error("num_ln_in_parallel_attn", "`1`, or `2` in the new decoder")
    if not is_parallel:
        return _NAMES
    if num_norms == 1:
        return replace(_NAMES, mlp_norm="")
    return replace(_NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp")

"""GPT-2 (Radford et al. 2019), and StarCoder 1 (Li et al. 2023), which shares a KV head."""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import MAX_LAYERS, ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    block="transformer.h.{}",
    attention_norm="ln_1",
    qkv="attn.c_attn",
    output="attn.c_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    prefixes=(("transformer.", ""),),
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a GPT2LMHeadModel's config or a GPTBigCodeForCausalLM's."""
    config.refuse("add_cross_attention")
    is_code = config.architecture == "GPTBigCodeForCausalLM"
    num_heads, head_dim = config.equal_heads("n_embd", "n_head")
    hidden_size = config.size("n_embd")
    num_positions = config.size("n_positions", 1024)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=1 if is_code and config.flag("multi_query", True) else num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0,
        rope=None,
        has_bias=True,
        has_output_bias=True,
    )
    is_divided = config.flag("scale_attn_by_inverse_layer_idx") and not is_code
    mlp = MLPSpec(
        size=config.size("n_inner", 4 * hidden_size),
        activation=config.activation(
            "activation_function", "gelu_pytorch_tanh" if is_code else "gelu_new"
        ),
        is_gated=False,
        has_bias=True,
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(
            LayerSpec(
                attention=replace(
                    attention, scale=attention.scale / (index + 1 if is_divided else 1)
                ),
                mlp=mlp,
            )
            for index in range(config.size("n_layer", high=MAX_LAYERS))
        ),
        norm=NormSpec(eps=config.factor("layer_norm_epsilon", 1e-5), kind="layer", has_bias=True),
        max_context_len=num_positions,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=replace(
            _NAMES,
            is_transposed=not is_code,
            qkv_rows="stacked" if not is_code or attention.num_kv_heads == 1 else "heads",
        ),
        num_positions=num_positions,
    )

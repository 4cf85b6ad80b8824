"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.rope import RopeDefaults, read_rope
from penstock.models.spec import LayerSpec, ModelSpec, Names

_NAMES = Names(
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    block="gpt_neox.layers.{}",
    qkv="attention.query_key_value",
    qkv_rows="heads",
    output="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    prefixes=(("embed_out.", "lm_head."),),  # as newer releases of transformers may write it
)
_ROPE = RopeDefaults(share=0.25, theta_key="rotary_emb_base", share_key="rotary_pct")


def read(config: ConfigReader) -> ModelSpec:
    """Read a GPTNeoXForCausalLM's config."""
    num_heads, head_dim = config.equal_heads("hidden_size", "num_attention_heads")
    has_bias = config.flag("attention_bias", True)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read_rope(config, head_dim, _ROPE),
            has_bias=has_bias,
            has_output_bias=has_bias,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "gelu"),
            is_gated=False,
            has_bias=True,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("layer_norm_eps", 1e-5), kind="layer", has_bias=True),
        max_context_len=config.size("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=_NAMES,
        arrangement="parallel" if config.flag("use_parallel_residual", True) else "pre",
    )

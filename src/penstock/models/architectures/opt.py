"""OPT (Zhang et al. 2022)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_FIRST = 2  # row of position 0
_NAMES = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    block="model.decoder.layers.{}",
    attention_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    prefixes=(("model.decoder.", "decoder."),),
)


def read(config: ConfigReader) -> ModelSpec:
    """Read an OPTForCausalLM's config. Norms behind the sums (350m) are refused."""
    config.refuse("_remove_final_layer_norm")
    config.expect("do_layer_norm_before", True)
    config.expect("layer_norm_elementwise_affine", True)
    hidden_size = config.size("hidden_size")
    config.expect("word_embed_proj_dim", hidden_size)
    num_heads, head_dim = config.equal_heads("hidden_size", "num_attention_heads")
    has_bias = config.flag("enable_bias", True)
    max_context_len = config.size("max_position_embeddings", 2048)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=None,
            has_bias=has_bias,
            has_output_bias=has_bias,
        ),
        mlp=MLPSpec(
            size=config.size("ffn_dim"),
            activation=config.activation("activation_function", "relu"),
            is_gated=False,
            has_bias=has_bias,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=1e-5, kind="layer", has_bias=True),
        max_context_len=max_context_len,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=_NAMES,
        num_positions=max_context_len + _FIRST,
        first_position=_FIRST,
    )

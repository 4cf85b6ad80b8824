"""GPT-J (Wang and Komatsuzaki 2021)."""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec, RopeSpec
from penstock.models.config import MAX_LAYERS, ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_NAMES = Names(
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    block="transformer.h.{}",
    attention_norm="ln_1",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    output="attn.out_proj",
    mlp_norm="",
    up="mlp.fc_in",
    down="mlp.fc_out",
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a GPTJForCausalLM's config."""
    num_heads, head_dim = config.equal_heads("n_embd", "n_head")
    hidden_size = config.size("n_embd")
    rotated = config.optional("rotary_dim", 64)
    if rotated is None or rotated % 2 or rotated > head_dim:
        raise config.error("rotary_dim", f"an even integer of at most `{head_dim}`")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=RopeSpec(dim=rotated, theta=10000.0, is_interleaved=True),
        ),
        mlp=MLPSpec(
            size=config.size("n_inner", 4 * hidden_size),
            activation=config.activation("activation_function", "gelu_new"),
            is_gated=False,
            has_bias=True,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.size("n_layer", high=MAX_LAYERS),
        norm=NormSpec(eps=config.factor("layer_norm_epsilon", 1e-5), kind="layer", has_bias=True),
        max_context_len=config.size("n_positions", 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=_NAMES,
        arrangement="parallel",
        has_head_bias=True,
    )

"""Models that are Llama but for a detail: InternLM 2 and 3, Seed-OSS, Arcee's AFM, Helium."""

from __future__ import annotations

from typing import NamedTuple

from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names


class _Kind(NamedTuple):
    """What an architecture has that Llama has not, and what its absent keys mean."""

    max_context_len: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    eps: float = 1e-5
    theta: float = 1e4
    is_interleaved: bool = False
    activation: str = "silu"
    is_gated: bool = True
    names: Names = Names()


_INTERN = Names(
    embedding="model.tok_embeddings",
    head="output",
    attention_norm="attention_norm",
    qkv="attention.wqkv",
    qkv_rows="groups",
    output="attention.wo",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)
_KINDS = {
    "InternLM2ForCausalLM": _Kind(2048, eps=1e-6, names=_INTERN),
    "InternLM3ForCausalLM": _Kind(32768, num_kv_heads=2, head_dim=128),
    "SeedOssForCausalLM": _Kind(524288, num_kv_heads=8, head_dim=128, eps=1e-6),
    "ArceeForCausalLM": _Kind(4096, activation="relu2", is_gated=False),
    "HeliumForCausalLM": _Kind(
        4096, num_kv_heads=20, head_dim=128, eps=1e-8, theta=1e5, is_interleaved=True
    ),
}


def read(config: ConfigReader) -> ModelSpec:
    """Read the config of one of these."""
    config.refuse("layer_types", "sliding_window", "use_qk_norm")
    kind = _KINDS[config.architecture]
    num_heads, num_kv_heads, head_dim = config.heads(
        num_kv_heads=kind.num_kv_heads, head_dim=kind.head_dim
    )
    config = config.filled(max_position_embeddings=kind.max_context_len)
    has_bias, has_output_bias, has_mlp_bias = _biases(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=config.rope(head_dim, theta=kind.theta, is_interleaved=kind.is_interleaved),
            has_bias=has_bias,
            has_output_bias=has_output_bias,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", kind.activation),
            is_gated=kind.is_gated,
            has_bias=has_mlp_bias,
        ),
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("rms_norm_eps", kind.eps)),
        max_context_len=config.size("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        names=kind.names,
    )


def _biases(config: ConfigReader) -> tuple[bool, bool, bool]:
    """Of queries, keys and values, of attention's output, and of the MLP."""
    if config.architecture == "InternLM2ForCausalLM":  # no MLP of it has biases
        has_bias = config.flag("bias", True)
        return has_bias, has_bias, False
    is_seed = config.architecture == "SeedOssForCausalLM"
    has_bias = config.flag("attention_bias", is_seed)
    has_mlp_bias = config.flag("mlp_bias")
    if is_seed:
        return has_bias, config.flag("attention_out_bias"), has_mlp_bias
    if config.architecture == "HeliumForCausalLM":
        return has_bias, False, has_mlp_bias
    if config.architecture == "InternLM3ForCausalLM":  # published with names of its own
        has_mlp_bias = config.flag("bias", has_mlp_bias)
        return config.flag("qkv_bias", has_bias), has_mlp_bias, has_mlp_bias
    return has_bias, has_bias, has_mlp_bias

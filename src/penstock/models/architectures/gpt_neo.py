"""GPT-Neo (Black et al. 2021): scores without a scale, and windows in every other layer."""

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
    q="attn.attention.q_proj",
    k="attn.attention.k_proj",
    v="attn.attention.v_proj",
    output="attn.attention.out_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a GPTNeoForCausalLM's config."""
    num_heads, head_dim = config.equal_heads("hidden_size", "num_heads")
    num_positions = config.size("max_position_embeddings", 2048)
    window = config.size("window_size", 256)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        scale=1.0,
        rope=None,
        has_output_bias=True,
    )
    local = replace(attention, window=window if window < num_positions else 0)
    mlp = MLPSpec(
        size=config.size("intermediate_size", 4 * config.size("hidden_size")),
        activation=config.activation("activation_function", "gelu_new"),
        is_gated=False,
        has_bias=True,
    )
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(attention=local if is_local else attention, mlp=mlp)
            for is_local in _locals(config, config.size("num_layers", high=MAX_LAYERS))
        ),
        norm=NormSpec(eps=config.factor("layer_norm_epsilon", 1e-5), kind="layer", has_bias=True),
        max_context_len=num_positions,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        dtype=config.dtype,
        names=_NAMES,
        num_positions=num_positions,
    )


def _locals(config: ConfigReader, num_layers: int) -> list[bool]:
    """Which layers have a window: `attention_types` is a list of [kinds, how often]."""
    key = "attention_types"
    wrong = config.error(key, f"a list of [kinds, number], of `{num_layers}` layers in all")
    kinds: list[str] = []
    for run in config.value(list, key, [[["global", "local"], 12]]):
        match run:
            case [[*names], int(times)] if 0 <= times <= num_layers:
                kinds += [name for _ in range(times) for name in names][: num_layers + 1]
            case _:
                raise wrong
        if len(kinds) > num_layers:
            raise wrong
    if len(kinds) != num_layers or not all(kind in ("global", "local") for kind in kinds):
        raise wrong
    return [kind == "local" for kind in kinds]

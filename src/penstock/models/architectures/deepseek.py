"""DeepSeek V2 and V3 (2024): latent attention, shared and routed experts, grouped routing."""

from __future__ import annotations

import math

from penstock.layers.specs import ExpertsSpec, LatentSpec, MLPSpec, NormSpec, RopeSpec
from penstock.models.config import MAX_LAYERS, ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


def read(config: ConfigReader) -> ModelSpec:
    """Read the config of a DeepseekV2ForCausalLM or DeepseekV3ForCausalLM."""
    is_v3 = config.architecture == "DeepseekV3ForCausalLM"
    config.refuse("mlp_bias")
    num_layers = config.num_layers
    num_dense = config.count("first_k_dense_replace", 3 if is_v3 else 0)
    config.expect("moe_layer_freq", 1)
    guesses = config.count("num_nextn_predict_layers", 0, high=MAX_LAYERS)
    attention = _attention(config, is_v3=is_v3)
    dense = MLPSpec(
        size=config.size("intermediate_size"), activation=config.activation("hidden_act", "silu")
    )
    experts = _experts(config, is_v3=is_v3)
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=tuple(
            LayerSpec(attention=attention, mlp=dense if index < num_dense else experts)
            for index in range(num_layers)
        ),
        norm=NormSpec(eps=config.factor("rms_norm_eps", 1e-6)),
        max_context_len=config.size("max_position_embeddings", 4096 if is_v3 else 2048),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype,
        # Behind the last block V3 has what guesses one token more, which nothing here uses.
        names=Names(
            ignored=tuple(f"model.layers.{num_layers + index}." for index in range(guesses))
        ),
    )


def _attention(config: ConfigReader, *, is_v3: bool) -> LatentSpec:
    nope_dim = config.size("qk_nope_head_dim", 128)
    rope_dim = config.size("qk_rope_head_dim", 64)
    is_interleaved = config.flag("rope_interleave", True) if is_v3 else True
    rope = config.rope(rope_dim, is_interleaved=is_interleaved)
    return LatentSpec(
        num_heads=config.size("num_attention_heads"),
        query_rank=config.optional("q_lora_rank", 1536) or 0,
        rank=config.size("kv_lora_rank", 512),
        nope_dim=nope_dim,
        value_dim=config.size("v_head_dim", 128),
        scale=(nope_dim + rope_dim) ** -0.5 * _stretch(config, rope) ** 2,
        rope=rope,
        norm=NormSpec(eps=_LATENT_EPS),
        has_bias=config.flag("attention_bias"),
    )


def _stretch(config: ConfigReader, rope: RopeSpec) -> float:
    """By what YaRN multiplies queries and keys beside the rotation (Peng et al. 2023)."""
    section = config.section("rope_scaling") or config.section("rope_parameters")
    if section is None or rope.scaling is None or not section.has("mscale_all_dim"):
        return 1.0
    factor = section.factor("factor")
    mscale = section.value(float, "mscale_all_dim")
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _experts(config: ConfigReader, *, is_v3: bool) -> ExpertsSpec:
    num_experts = config.size("n_routed_experts", 256 if is_v3 else 64)
    size = config.size("moe_intermediate_size")
    num_groups, top_groups = _groups(config, num_experts, is_v3=is_v3)
    if not is_v3:
        config.refuse("norm_topk_prob")
    config.expect("topk_method", *(("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")))
    config.expect("scoring_func", "sigmoid" if is_v3 else "softmax")
    return ExpertsSpec(
        num_experts=num_experts,
        top_k=config.top_k(num_experts, 8 if is_v3 else None),
        size=size,
        activation=config.activation("hidden_act", "silu"),
        scoring="sigmoid" if is_v3 else "softmax",
        is_normalised=is_v3 and config.flag("norm_topk_prob", True),
        scale=config.factor("routed_scaling_factor", 2.5 if is_v3 else 1.0),
        has_correction=is_v3,
        num_groups=num_groups,
        top_groups=top_groups,
        group_top=2 if is_v3 else 1,
        shared_size=size * config.size("n_shared_experts", 1 if is_v3 else 2),
    )


def _groups(config: ConfigReader, num_experts: int, *, is_v3: bool) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may choose from."""
    if not is_v3 and config.value(str, "topk_method", "greedy") == "greedy":
        return 1, 1
    num_groups = config.size("n_group", 8 if is_v3 else 1)
    if num_experts % num_groups or (is_v3 and num_experts // num_groups < 2):
        raise config.error("n_group", f"a divisor of `{num_experts}` experts")
    return num_groups, config.size("topk_group", 4 if is_v3 else 1, high=num_groups)

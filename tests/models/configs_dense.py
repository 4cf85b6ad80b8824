"""Small random configs of the architectures without experts, for the parity test."""

from __future__ import annotations

from typing import Any

import transformers

Variants = dict[str, dict[str, Any]]

BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # logits of a size that shows a mistake
}


def variants(base: dict[str, Any], **changes: dict[str, Any]) -> Variants:
    """The base, and the base with some changes, by name."""
    return {"plain": base} | {name: base | change for name, change in changes.items()}


def without(base: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The base without some keys, for config classes that have not all of them."""
    return {key: value for key, value in base.items() if key not in keys}


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    """RoPE of all layers."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **keys}}


def layers(*slides: int) -> dict[str, Any]:
    """Layers with a window (1) and without (0)."""
    names = ["full_attention", "sliding_attention"]
    return {"num_hidden_layers": len(slides), "layer_types": [names[slide] for slide in slides]}


def classes(architecture: str) -> tuple[Any, Any]:
    """The transformers classes of a model and of its config."""
    if architecture == "InternLM2ForCausalLM":  # published with code of its own: see `layouts`
        return transformers.LlamaForCausalLM, transformers.LlamaConfig
    if architecture == "InternLM3ForCausalLM":  # no model of its own
        return transformers.LlamaForCausalLM, transformers.InternLM3Config
    kind = getattr(transformers, architecture)
    return kind, kind.config_class


# More heads than a power of two, heads that are no multiple of four, an odd vocabulary.
_ODD = {"num_attention_heads": 6, "hidden_size": 60, "vocab_size": 131}
_MHA = {"num_key_value_heads": 4}
_MQA = {"num_key_value_heads": 1}
_THREE = _ODD | {"num_key_value_heads": 2}
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_BIAS = {"attention_bias": True}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LLAMA = variants(
    BASE,
    gqa={},
    thirds=_THREE,
    mha=_MHA | {"rms_norm_eps": 1e-2},
    mqa=_MQA | {"num_hidden_layers": 3},
    wide_heads={"head_dim": 32},
    narrow_heads={"head_dim": 6, "num_attention_heads": 6},
    tied=_TIED | {"vocab_size": 257},
    attention_bias=_BIAS,
    mlp_bias=_BIAS | {"mlp_bias": True, "head_dim": 20},
    gelu={"hidden_act": "gelu"},
    rope_theta=rope("default", rope_theta=100.0),
    rope_llama3=rope("llama3", **_LLAMA3),
    rope_linear=rope("linear", factor=4.0),
    rope_dynamic=rope("dynamic", factor=4.0),
    rope_yarn=rope("yarn", **_YARN),
    rope_yarn_whole=rope("yarn", truncate=False, beta_fast=8.0, beta_slow=2.0, **_YARN),
    rope_yarn_factor=rope("yarn", attention_factor=1.3, **_YARN),
    rope_yarn_scales=rope("yarn", mscale=1.4, mscale_all_dim=0.7, **_YARN),
    rope_longrope=rope(
        "longrope",
        short_factor=[1.0] * 6,
        long_factor=[1.0, 1.1, 1.5, 2.0, 4.0, 8.0],
        original_max_position_embeddings=16,
    ),
)

MISTRAL = variants(
    BASE | {"sliding_window": 7},
    full={"sliding_window": None},
    longer_window={"sliding_window": 40} | _THREE,
    barely_used={"sliding_window": 200, "head_dim": 16},
    window_of_one={"sliding_window": 1} | _MHA,
    tied=_TIED,
)
MINISTRAL = variants(
    BASE | {"sliding_window": 7, "head_dim": 12},
    mixed=layers(1, 0, 1),
    full={"head_dim": 18} | layers(0, 0),
)
_BETA = rope("yarn", llama_4_scaling_beta=0.1, factor=2.0, original_max_position_embeddings=64)
MINISTRAL3 = variants(
    BASE | {"head_dim": 12} | _BETA,
    windowed={"sliding_window": 9} | _THREE,
)
SMOLLM3 = variants(
    BASE | {"num_hidden_layers": 5, "pad_token_id": 0},
    listed={"no_rope_layers": [0, 1, 1, 0, 1], **_BIAS, **_UNTIED},
    interval={"no_rope_layer_interval": 2, "mlp_bias": True} | _THREE,
    windowed={"use_sliding_window": True, "sliding_window": 7},
)
QWEN2 = variants(
    BASE,
    tied=_TIED | _THREE,
    windowed={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    mixed={"use_sliding_window": True, "sliding_window": 5} | layers(0, 1, 0),
    unused_window={"sliding_window": 7, "max_window_layers": 0},
    yarn=rope("yarn", **_YARN),
    mha=_MHA,
)
QWEN3 = variants(
    BASE | {"head_dim": 16},
    tied=_TIED | _THREE | {"head_dim": 10},
    biased=_BIAS | _MQA,
    windowed={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
)

_GEMMA = BASE | {"head_dim": 16}
GEMMA = variants(
    _GEMMA, mqa=_MQA | {"head_dim": 32}, untied=_UNTIED | _THREE, gelu={"hidden_act": "gelu"}
)
GEMMA2 = variants(
    _GEMMA | {"sliding_window": 7, "query_pre_attn_scalar": 24, "num_hidden_layers": 3},
    low_caps={"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    no_caps={"attn_logit_softcapping": None, "final_logit_softcapping": None} | _BIAS,
    listed=layers(0, 1, 1) | _THREE | _UNTIED,
)
_GEMMA3 = _GEMMA | {"sliding_window": 7, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}
_BY_KIND = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}
GEMMA3 = variants(
    _GEMMA3,
    by_kind=_BY_KIND | {"sliding_window_pattern": 3},
    listed=layers(0, 1, 1) | _THREE | _UNTIED | {"final_logit_softcapping": 4.0},
)
_NO_SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3_PART: Variants = {
    "text": {
        "text_config": _GEMMA3 | _BY_KIND,
        "vision_config": _NO_SIGHT,
        "mm_tokens_per_image": 1,
    }
}
MISTRAL3_PART: Variants = {
    "text": {
        "text_config": MISTRAL["plain"] | {"model_type": "mistral"},
        "vision_config": _NO_SIGHT | {"head_dim": 8},
    },
    "third": {
        "text_config": MINISTRAL3["plain"] | {"model_type": "ministral3"},
        "vision_config": _NO_SIGHT | {"head_dim": 8},
    },
}

PHI = variants(
    BASE, whole=rope("default", partial_rotary_factor=1.0), odd=_THREE | {"head_dim": 20}
)
_LONG = {
    "short_factor": [1.0, 1.0, 1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.2, 2.0, 3.0, 5.0, 9.0],
}
PHI3 = variants(
    BASE | {"pad_token_id": 0},
    windowed={"sliding_window": 7} | _THREE,
    longrope=rope("longrope", **_LONG) | {"original_max_position_embeddings": 16},
    shortrope=rope("longrope", **_LONG) | {"original_max_position_embeddings": 128},
    partial=rope(
        "longrope",
        partial_rotary_factor=0.7,
        short_factor=[1.0] * 4,
        long_factor=[1.0, 2.0, 3.0, 4.0],
    )
    | {"original_max_position_embeddings": 32}
    | _TIED,
)
OLMO = variants(without(BASE, "head_dim"), biased=_BIAS | _THREE, tied=_TIED)
OLMO2 = variants(BASE, biased=_BIAS | _THREE, tied=_TIED | _MQA)
OLMO3 = variants(
    BASE | {"num_hidden_layers": 5, "sliding_window": 7},
    by_kind={
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "rope_theta": 900.0, **_YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
        }
    }
    | layers(0, 1),
    odd=_THREE,
)
GRANITE = variants(
    BASE
    | {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.11,
    },
    biased=_BIAS | {"mlp_bias": True} | _THREE,
    tied=_TIED,
)
STARCODER2 = variants(
    BASE, windowed={"sliding_window": 7} | _THREE, unbiased={"use_bias": False} | _UNTIED
)

_GPT2 = {
    "vocab_size": 101,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "initializer_range": 0.2,
}
GPT2 = variants(
    _GPT2,
    untied=_UNTIED | {"n_inner": 60, "activation_function": "relu"},
    by_layer={"scale_attn_by_inverse_layer_idx": True, "n_head": 3, "n_layer": 3},
    unscaled={"scale_attn_weights": False, "n_embd": 40},
)
BIGCODE = variants(_GPT2, mha={"multi_query": False}, untied=_UNTIED | {"n_inner": 60})
GPTJ = variants(
    _GPT2 | {"rotary_dim": 8}, tied=_TIED | {"n_inner": 60}, whole={"rotary_dim": 12, "n_layer": 3}
)
NEO = variants(
    {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 48,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 7,
        "initializer_range": 0.2,
    },
    untied=_UNTIED | {"intermediate_size": 60, "attention_types": [[["local"], 3]]},
)
NEOX = variants(
    without(BASE, "num_key_value_heads") | rope("default", partial_rotary_factor=0.5),
    serial={"use_parallel_residual": False},
    unbiased={"attention_bias": False} | _TIED,
    whole=rope("default", partial_rotary_factor=1.0) | _ODD,
)
_FALCON = without(BASE, "num_key_value_heads", "intermediate_size") | {"vocab_size": 103}
FALCON = variants(
    _FALCON,
    mha={"multi_query": False, "bias": True},
    serial={"parallel_attn": False} | _ODD,
    new={"new_decoder_architecture": True, "num_kv_heads": 2},
    new_one_norm={
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 80,
        **_UNTIED,
        **_ODD,
    },
)
COHERE = variants(
    BASE | {"logit_scale": 0.5},
    normed={"use_qk_norm": True} | _THREE,
    biased=_BIAS | _UNTIED | {"use_qk_norm": True},
)
COHERE2 = variants(
    BASE | {"logit_scale": 0.5, "sliding_window": 7, "num_hidden_layers": 5},
    listed=layers(0, 1, 1) | _THREE | _BIAS | _UNTIED,
    pattern={"sliding_window_pattern": 2},
)
STABLELM = variants(
    BASE | {"hidden_size": 64},
    biased={"use_qkv_bias": True} | _TIED,
    parallel={"use_parallel_residual": True} | rope("default", partial_rotary_factor=0.5),
)
OPT = variants(
    {
        "vocab_size": 101,
        "hidden_size": 48,
        "ffn_dim": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "init_std": 0.2,
    },
    untied=_UNTIED | {"enable_bias": False},
)

INTERNLM2 = variants(BASE, biased=_BIAS | _THREE, mha=_MHA | rope("dynamic", factor=2.0))
INTERNLM3 = variants(BASE | {"head_dim": 12}, biased={"qkv_bias": True, "bias": True} | _THREE)
SEED = variants(
    BASE | {"head_dim": 16},
    unbiased={"attention_bias": False, "mlp_bias": True} | _THREE,
    output_bias={"attention_out_bias": True} | _TIED,
)
ARCEE = variants(BASE, biased=_BIAS | {"mlp_bias": True} | _THREE)
HELIUM = variants(BASE | {"head_dim": 12}, biased=_BIAS | {"mlp_bias": True}, mha=_MHA | _TIED)
_GLM = BASE | {"head_dim": 16, "pad_token_id": 0}
GLM = variants(_GLM, unbiased={"attention_bias": False} | _THREE)
_POST = {"sliding_window": 7, "num_hidden_layers": 5}
EXAONE4 = variants(BASE | _POST, every={"sliding_window_pattern": 2} | _THREE, listed=layers(1, 0))
EXAONE4["full"] = BASE | {"sliding_window": None} | layers(0, 0)
NEMOTRON = variants(BASE | {"hidden_size": 64}, biased=_BIAS | {"mlp_bias": True} | _TIED)

# Architecture -> name of the variant -> arguments of its transformers config class.
DENSE: dict[str, Variants] = {
    "ArceeForCausalLM": ARCEE,
    "Cohere2ForCausalLM": COHERE2,
    "CohereForCausalLM": COHERE,
    "Exaone4ForCausalLM": EXAONE4,
    "FalconForCausalLM": FALCON,
    "GPT2LMHeadModel": GPT2,
    "GPTBigCodeForCausalLM": BIGCODE,
    "GPTJForCausalLM": GPTJ,
    "GPTNeoForCausalLM": NEO,
    "GPTNeoXForCausalLM": NEOX,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_PART,
    "GemmaForCausalLM": GEMMA,
    "Glm4ForCausalLM": GLM,
    "GlmForCausalLM": GLM,
    "GraniteForCausalLM": GRANITE,
    "HeliumForCausalLM": HELIUM,
    "InternLM2ForCausalLM": INTERNLM2,
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,
    "Ministral3ForCausalLM": MINISTRAL3,
    "MinistralForCausalLM": MINISTRAL,
    "Mistral3ForConditionalGeneration": MISTRAL3_PART,
    "MistralForCausalLM": MISTRAL,
    "NemotronForCausalLM": NEMOTRON,
    "OPTForCausalLM": OPT,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "OlmoForCausalLM": OLMO,
    "Phi3ForCausalLM": PHI3,
    "PhiForCausalLM": PHI,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "SeedOssForCausalLM": SEED,
    "SmolLM3ForCausalLM": SMOLLM3,
    "StableLmForCausalLM": STABLELM,
    "Starcoder2ForCausalLM": STARCODER2,
}

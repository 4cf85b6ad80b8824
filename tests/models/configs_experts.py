"""Small random configs of mixtures of experts: see `configs.py`."""

from __future__ import annotations

from typing import Any

_SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_MIXTRAL = _SMALL | {"num_local_experts": 5, "num_experts_per_tok": 2}
_QWEN = _SMALL | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_GPT_OSS = _SMALL | {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 7,
    "num_hidden_layers": 3,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
_LATENT = {
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
_V2 = _SMALL | _LATENT | {"n_shared_experts": 2, "topk_method": "greedy"}
_V3 = _SMALL | _LATENT | {"n_group": 4, "topk_group": 2, "n_shared_experts": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}

EXPERTS: dict[str, dict[str, dict[str, Any]]] = {
    "MixtralForCausalLM": {
        "top2": _MIXTRAL,
        "window": _MIXTRAL | {"sliding_window": 7, "num_experts_per_tok": 1},
    },
    "Qwen2MoeForCausalLM": {
        "shared": _QWEN | {"shared_expert_intermediate_size": 36},
        "sparse_step": _QWEN
        | {
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 3,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
        "window": _QWEN
        | {
            "shared_expert_intermediate_size": 36,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "mlp_only_layers": [0],
        },
    },
    "Qwen3MoeForCausalLM": {
        "normalised": _QWEN | {"norm_topk_prob": True, "head_dim": 16},
        "mlp_only": _QWEN | {"mlp_only_layers": [1], "attention_bias": True, "head_dim": 6},
        "window": _QWEN | {"use_sliding_window": True, "sliding_window": 9},
    },
    "OlmoeForCausalLM": {
        "qk_norm": _SMALL | {"num_experts": 6, "num_experts_per_tok": 4},
        "normalised": _SMALL | {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
    },
    "GptOssForCausalLM": {
        "sinks": _GPT_OSS,
        "mqa": _GPT_OSS | {"num_key_value_heads": 1, "attention_bias": False},
    },
    "DeepseekV2ForCausalLM": {
        "greedy": _V2,
        "lite": _V2 | {"q_lora_rank": None, "n_shared_experts": 1, "attention_bias": True},
        "groups": _V2
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            "rope_parameters": _YARN,
        },
    },
    "DeepseekV3ForCausalLM": {
        "groups": _V3,
        "halves": _V3 | {"rope_interleave": False, "norm_topk_prob": False},
        "yarn": _V3 | {"rope_parameters": _YARN, "max_position_embeddings": 128},
    },
}

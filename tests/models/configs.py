"""Small random configs for every registered architecture: the parity test draws from these.

An architecture that is registered and has no entry here fails the parity test.
"""

from __future__ import annotations

from typing import Any

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # logits of a size that shows a mistake
}

# Architecture -> name of the variant -> arguments of its transformers config class.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": {
        "gqa": _LLAMA,
        "mha": _LLAMA | {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        "mqa": _LLAMA | {"num_key_value_heads": 1, "num_hidden_layers": 3},
        "wide_heads": _LLAMA | {"head_dim": 32},
        "narrow_heads": _LLAMA | {"head_dim": 6, "num_attention_heads": 6},
        "tied": _LLAMA | {"tie_word_embeddings": True, "vocab_size": 257},
        "attention_bias": _LLAMA | {"attention_bias": True},
        "mlp_bias": _LLAMA | {"mlp_bias": True, "attention_bias": True, "head_dim": 20},
        "rope_llama3": _LLAMA | {"rope_parameters": _LLAMA3_ROPE},
        "rope_linear": _LLAMA
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        "rope_theta": _LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    }
}

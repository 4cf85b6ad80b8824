"""The models that are measured: real shapes, random weights, no files but a config.json.

Owns the configs. Knows no engine. `toy` is a shape that a CPU computes in milliseconds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.models.spec import ModelSpec

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA
    | _llama3(32.0)
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _LLAMA
    | _llama3(8.0)
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": _LLAMA
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "toy": _LLAMA
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
}

# What a shape is not, where its name promises more; goes into every result.
NOTES = {
    "qwen3-0.6b": "stand-in: the sizes of Qwen3-0.6B in a Llama, without its norms of queries and "
    "keys"
}


def spec(name: str) -> ModelSpec:
    """The shape as penstock reads it."""
    return ModelSpec.from_hf(CONFIGS[name])


@contextmanager
def directory(name: str) -> Iterator[Path]:
    """A model directory without weights: every engine here draws its own."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as path:
        Path(path, "config.json").write_text(json.dumps(CONFIGS[name], indent=1))
        yield Path(path)

"""The config reader: what published configs say, and that nothing unknown passes silently."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.errors import UnsupportedModel
from penstock.layers.scaling import LinearScaling, Llama3Scaling
from penstock.layers.specs import AttentionSpec, RopeSpec
from penstock.models.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "use_cache": True,
    "pretraining_tp": 1,
    "sliding_window": None,
}


def rope_of(spec: ModelSpec) -> RopeSpec:
    attention = spec.layers[0].attention
    assert isinstance(attention, AttentionSpec)
    assert attention.rope is not None
    return attention.rope


def test_llama_3_2_1b() -> None:
    spec = ModelSpec.from_hf(CONFIG)
    assert spec.num_parameters == 1_235_814_400  # as its card says
    assert (spec.head_dim, spec.num_kv_heads, spec.max_context_len) == (64, 8, 131072)
    assert spec.dtype == "bfloat16"
    assert rope_of(spec).scaling == Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_len=8192
    )
    assert spec.kv_bytes_per_token("bfloat16") == 16 * 2 * 8 * 64 * 2


def test_absent_and_null_keys_take_the_defaults() -> None:
    keys = ("architectures", "hidden_size", "intermediate_size", "num_attention_heads")
    small = {key: CONFIG[key] for key in (*keys, "num_hidden_layers", "vocab_size")}
    spec = ModelSpec.from_hf(small | {"num_key_value_heads": None, "head_dim": None})
    assert (spec.num_kv_heads, spec.head_dim, rope_of(spec).theta) == (32, 64, 10000.0)
    assert (spec.norm.eps, spec.dtype, spec.tied_embeddings) == (1e-6, "float32", False)
    assert rope_of(spec).scaling is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 7.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
    ],
)
def test_rope_is_read_in_every_spelling(rope: dict[str, Any]) -> None:
    config = {key: value for key, value in CONFIG.items() if not key.startswith("rope")}
    spec = ModelSpec.from_hf(config | {"rope_scaling": None} | rope)
    assert rope_of(spec).scaling == LinearScaling(2.0)
    assert rope_of(spec).theta == 7.0


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", "2048", "hidden_size"),
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", True, "hidden_size"),
        ("vocab_size", 1.5, "vocab_size"),
        ("num_key_value_heads", 5, "num_key_value_heads"),
        ("num_attention_heads", -1, "num_attention_heads"),
        ("head_dim", 63, "head_dim"),
        ("hidden_act", "mish", "hidden_act"),
        ("attention_bias", 1, "attention_bias"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
        ("torch_dtype", "int8", "torch_dtype"),
        ("dtype", "int8", "dtype"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps"),
        ("rope_theta", 0, "rope_theta"),
        ("rope_scaling", "linear", "rope_scaling"),
        ("rope_scaling", {"rope_type": "ntk", "factor": 2.0}, "rope_scaling.rope_type"),
        ("rope_scaling", {"type": "mrope", "factor": 2.0}, "rope_scaling.type"),
        ("rope_scaling", {"type": "dynamic"}, "rope_scaling.factor"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0, "alpha": 9.0}, "rope_scaling.alpha"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "rope_theta": 0.5}, "rope_scaling.rope_"),
        ("rope_scaling", {"type": "yarn", "truncate": 1}, "rope_scaling.truncate"),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0]}, "rope_scaling.short_factor"),
        (
            "rope_scaling",
            {"type": "su", "short_factor": [1.0] * 32, "long_factor": [10**400] * 32},
            "rope_scaling.long_factor",
        ),
        ("rope_scaling", {"partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("partial_rotary_factor", 1e308, "partial_rotary_factor"),
        ("layer_types", ["full_attention"] * 16, "layer_types"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_scaling.factor"),
        ("rope_scaling", {"rope_type": "linear", "factor": -1}, "rope_scaling.factor"),
        ("sliding_window", 4096, "sliding_window"),
        ("vocab_size", 10**400, "vocab_size"),
        ("num_hidden_layers", 10**400, "num_hidden_layers"),
        ("num_hidden_layers", 30_000, "num_hidden_layers"),
        ("max_position_embeddings", 10**400, "max_position_embeddings"),
        ("rope_theta", 10**400, "rope_theta"),
        ("rms_norm_eps", 10**400, "rms_norm_eps"),
        (
            "rope_scaling",
            {**CONFIG["rope_scaling"], "low_freq_factor": 4.0},
            "rope_scaling.low_freq_factor",
        ),
        ("rope_interleaved", True, "rope_interleaved"),
        ("architectures", None, "architectures"),
        ("architectures", [], "architectures"),
        ("architectures", "LlamaForCausalLM", "architectures"),
    ],
)
def test_what_is_not_implemented_is_named(key: str, value: Any, named: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_hf(CONFIG | {key: value})
    assert f"`{named}" in caught.value.message
    assert len(caught.value.message) < 300

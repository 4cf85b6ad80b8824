"""What each architecture's file reads: absent keys, other names, and what it refuses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.configs_dense import DENSE, MISTRAL, classes, layers
from tests.models.configs_experts import EXPERTS
from tests.models.helpers import Sessions, load
from tests.models.published import PUBLISHED

from penstock.errors import UnsupportedModel, WeightMismatch
from penstock.layers.specs import AttentionSpec
from penstock.models.registry import read_spec

PARTS = {name for name in DENSE if name.endswith("ForConditionalGeneration")}
# Keys without which nothing is known of a model's size.
SIZES = {"vocab_size", "hidden_size", "n_embd", "intermediate_size", "ffn_dim", "architectures"}
SIZES |= {"num_hidden_layers", "n_layer", "num_attention_heads", "n_head"}
SIZES |= {"num_layers", "num_heads", "moe_intermediate_size"}
# Its class fills in a whole object, or nothing; blocks are left only if a config says so.
NEEDED = {
    "Ministral3ForCausalLM": {"rope_parameters"},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok"},
    "DeepseekV3ForCausalLM": {"num_nextn_predict_layers"},
}
NO_DEFAULT = {"DeepseekV2ForCausalLM": {"num_experts_per_tok": 6}}


def class_config(architecture: str, **keys: Any) -> Any:
    return classes(architecture)[1](**keys)


@pytest.mark.parametrize(
    "architecture", sorted((set(DENSE) | set(EXPERTS)) - PARTS - {"InternLM2ForCausalLM"})
)
def test_an_absent_key_means_what_it_means_to_transformers(architecture: str) -> None:
    config = class_config(architecture, **NO_DEFAULT.get(architecture, {}))
    whole = config.to_dict() | {"architectures": [architecture]}
    spec = read_spec(whole)
    assert read_spec(config.to_diff_dict() | {"architectures": [architecture]}) == spec
    for key in set(whole) - SIZES - NEEDED.get(architecture, set()):
        less = {name: value for name, value in whole.items() if name != key}
        assert read_spec(less) == spec, key
    sizes = {key: whole[key] for key in whole if key in SIZES | NEEDED.get(architecture, set())}
    assert read_spec(sizes) == spec


def test_an_absent_key_of_a_text_part() -> None:
    text = transformers.Gemma3TextConfig()
    name = "Gemma3ForConditionalGeneration"
    spec = read_spec({"architectures": [name], "text_config": text.to_dict()})
    assert read_spec({"architectures": [name], "text_config": {}}) == spec
    alone = read_spec(text.to_dict() | {"architectures": ["Gemma3ForCausalLM"]})
    assert alone.layers == spec.layers
    assert spec.tied_embeddings


def renamed(path: Path, tmp_path: Path, changes: list[tuple[str, str]]) -> Path:
    """The checkpoint with other names: those that begin with the first begin with the second."""
    tmp_path.mkdir()
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    for old, new in changes:
        assert any(name.startswith(old) for name in tensors)
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def saved(architecture: str, variant: str, path: Path) -> Path:
    torch.manual_seed(0)
    kind, config_kind = classes(architecture)
    kind(config_kind(**DENSE[architecture][variant])).save_pretrained(path)
    return path


OTHER_NAMES: dict[str, list[tuple[str, str]]] = {
    "GPT2LMHeadModel": [("transformer.", "")],  # as gpt2 itself was published
    "GPTBigCodeForCausalLM": [("transformer.", "")],
    "OPTForCausalLM": [("model.decoder.", "decoder.")],
    "Gemma3ForConditionalGeneration": [
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("architecture", OTHER_NAMES)
def test_checkpoints_with_other_names_are_the_same(architecture: str, tmp_path: Path) -> None:
    first = saved(architecture, next(iter(DENSE[architecture])), tmp_path / "first")
    second = renamed(first, tmp_path / "second", OTHER_NAMES[architecture])
    tokens = {"a": [1, 7, 3, 9, 4]}
    logits = [Sessions(load(path), block_size=3).step(tokens)["a"] for path in (first, second)]
    assert torch.equal(*logits)


def test_a_text_part_must_be_whole(tmp_path: Path) -> None:
    first = saved("Gemma3ForConditionalGeneration", "text", tmp_path / "first")
    second = renamed(first, tmp_path / "second", [("language_model.model.norm.", "other.")])
    with pytest.raises(WeightMismatch, match="`2` weights") as caught:
        load(second)
    assert "missing: `language_model.model.norm.weight`" in caught.value.message
    assert "unexpected: `other.weight`" in caught.value.message


def test_the_buffers_of_old_checkpoints_are_left(tmp_path: Path) -> None:
    first = saved("GPT2LMHeadModel", "plain", tmp_path / "first")
    second = renamed(first, tmp_path / "second", [("transformer.", "")])
    tensors = load_file(second / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, second / "model.safetensors")
    load(second)


def test_what_guesses_one_token_more_is_left(tmp_path: Path) -> None:
    """DeepSeek V3 is published with a block behind its last one."""
    torch.manual_seed(0)
    kind, config_kind = classes("DeepseekV3ForCausalLM")
    kind(config_kind(**EXPERTS["DeepseekV3ForCausalLM"]["groups"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(4, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(WeightMismatch, match=r"unexpected: `model.layers.3.eh_proj.weight`"):
        load(tmp_path)


def windows_of(config: dict[str, Any]) -> list[int]:
    found = [layer.attention for layer in read_spec(config).layers]
    return [attention.window for attention in found if isinstance(attention, AttentionSpec)]


def test_windows_of_mixtures() -> None:
    def windows(architecture: str, **change: Any) -> list[int]:
        config = EXPERTS[architecture]["window"] | {"architectures": [architecture]}
        return windows_of(config | change)

    assert windows("Qwen3MoeForCausalLM", max_window_layers=1) == [9, 9]  # whatever that says
    assert windows("Qwen3MoeForCausalLM", use_sliding_window=False) == [0, 0]
    kinds = ["full_attention", "sliding_attention"]
    assert windows("Qwen2MoeForCausalLM", layer_types=kinds) == [0, 9]
    with pytest.raises(UnsupportedModel, match="`use_sliding_window`"):
        windows("Qwen2MoeForCausalLM")
    for architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        with pytest.raises(UnsupportedModel, match="`layer_types`"):
            windows(architecture, layer_types=kinds, use_sliding_window=False)


def refused() -> Iterator[tuple[str, str, Any]]:
    """Architecture, key and value of what would change the result and is not implemented."""
    unknown_layers = ["full_attention", "chunked_attention"]
    yield "CohereForCausalLM", "position_embedding_type", "alibi"
    yield "Cohere2ForCausalLM", "use_qk_norm", True
    yield "Cohere2ForCausalLM", "layer_types", unknown_layers
    yield "Cohere2ForCausalLM", "layer_types", [["full_attention"], {}]
    yield "Cohere2ForCausalLM", "sliding_window", None
    yield "FalconForCausalLM", "alibi", True
    yield "FalconForCausalLM", "num_ln_in_parallel_attn", 2
    yield "FalconForCausalLM", "activation", "xielu"
    yield "GPT2LMHeadModel", "add_cross_attention", True
    yield "GPT2LMHeadModel", "n_head", 5
    yield "GPTJForCausalLM", "rotary_dim", 7
    yield "GPTJForCausalLM", "rotary_dim", None
    yield "GPTNeoForCausalLM", "attention_types", [[["global"], 2]]
    yield "GPTNeoForCausalLM", "attention_types", [[["global"] * 10**4, 10**9]]
    yield "GPTNeoForCausalLM", "attention_types", [[["global", "strided", "local"], 1]]
    yield "GPTNeoXForCausalLM", "hidden_act", "snake"
    yield "Gemma2ForCausalLM", "use_bidirectional_attention", True
    yield "Gemma2ForCausalLM", "attn_logit_softcapping", -1.0
    yield "Gemma3ForCausalLM", "attn_logit_softcapping", 50.0
    yield "Gemma3ForCausalLM", "rope_parameters", {"rope_type": "linear", "factor": 2.0}
    yield "MistralForCausalLM", "layer_types", ["full_attention"] * 2
    yield "MistralForCausalLM", "sliding_window", 0
    yield "OPTForCausalLM", "do_layer_norm_before", False
    yield "OPTForCausalLM", "word_embed_proj_dim", 24
    yield "OlmoForCausalLM", "clip_qkv", 8.0
    yield "Phi3ForCausalLM", "rope_scaling", {"type": "longrope", "short_factor": [1.0]}
    yield "PhiForCausalLM", "qk_layernorm", True
    yield "Qwen2ForCausalLM", "layer_types", ["sliding_attention"] * 2
    yield "Qwen2ForCausalLM", "is_causal", False
    yield "Qwen2ForCausalLM", "max_window_layers", -1
    yield "Qwen3ForCausalLM", "num_key_value_heads", 3
    yield "SmolLM3ForCausalLM", "no_rope_layers", [1, 2, 1, 1, 1]
    yield "SmolLM3ForCausalLM", "no_rope_layers", [1]
    yield "StableLmForCausalLM", "qk_layernorm", True
    yield "Starcoder2ForCausalLM", "norm_type", "rms_norm"


@pytest.mark.parametrize(("architecture", "key", "value"), list(refused()))
def test_what_is_not_implemented_is_named(architecture: str, key: str, value: Any) -> None:
    config = class_config(architecture, **DENSE[architecture]["plain"]).to_dict()
    config |= {"architectures": [architecture], "layer_types": None}
    read_spec(config)
    with pytest.raises(UnsupportedModel) as caught:
        read_spec(config | {key: value})
    name = key if key != "rope_scaling" else "rope_scaling.short_factor"
    assert f"`{name}`" in caught.value.message


@pytest.mark.parametrize("name", PUBLISHED)
def test_hostile_values_are_refused_at_once(name: str) -> None:
    config, _ = PUBLISHED[name]
    wrong: list[Any] = [-1, 0, 10**400, "x" * 10**5, [], [[]], {}, {"a": 1}, 1e308, float("nan")]
    for key in config:
        for value in wrong:
            with contextlib.suppress(UnsupportedModel):
                read_spec(config | {key: value})
    for section in ("rope_scaling", "text_config"):
        for key in config.get(section) or ():
            for value in wrong:
                with contextlib.suppress(UnsupportedModel):
                    spec = read_spec(config | {section: {**config[section], key: value}})
                    attention = spec.layers[0].attention
                    assert isinstance(attention, AttentionSpec)
                    assert attention.rope is None or attention.rope.frequencies().ndim == 1


def test_ministral_3_ends_where_its_queries_would_be_scaled() -> None:
    (config,) = [DENSE["Ministral3ForCausalLM"]["plain"]]
    spec = read_spec(config | {"architectures": ["Ministral3ForCausalLM"]})
    assert spec.max_context_len == 64 < config["max_position_embeddings"]


def test_a_window_that_is_never_full_is_none() -> None:
    def window(**change: Any) -> int:
        config = MISTRAL["plain"] | {"architectures": ["MistralForCausalLM"]} | change
        return windows_of(config)[0]

    assert window() == 7
    assert window(sliding_window=127) == 127
    assert window(sliding_window=128) == 0  # as many as there can be
    assert window(max_position_embeddings=7) == 0
    mixed = MISTRAL["plain"] | {"architectures": ["MinistralForCausalLM"]} | layers(0, 1)
    assert windows_of(mixed) == [0, 7]

"""GGUF files of random models: weights and configs come back as they were before the conversion."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gguf.quants import dequantize, quantize
from tests.models import gguf_files
from tests.models.gguf_files import Case, Weights, can_be, make

import gguf
from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.layers.scaling import Llama3Scaling, frequencies
from penstock.models import gguf_model
from penstock.models.files import read_generation_eos
from penstock.models.gguf.names import LAYOUTS, place_of
from penstock.quantization import ggml
from penstock.quantization.codes import CodedTensor, CutTensor, StoredTensor

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.5, 7.0, 9.0],
    "short_factor": [1.0, 1.25, 1.25, 1.5, 1.5, 1.5, 1.5, 1.75],
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 1.0,
}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}


def latent_keys(config: Any) -> dict[str, Any]:
    found = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    if config.q_lora_rank:
        found["attention.q_lora_rank"] = config.q_lora_rank
    if config.model_type == "deepseek_v3":
        found["expert_gating_func"] = 2
    if config.rope_parameters["rope_type"] == "yarn":
        found |= gguf_files.yarn_keys(config)
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * config.rope_parameters["mscale_all_dim"]
    return found


def soft_caps(config: Any) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def granite_scales(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def long_factors(config: Any) -> Weights:
    rope = config.rope_parameters
    return {
        f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
        for name in ("long", "short")
    }


CASES = {
    "llama": Case("llama", "LlamaForCausalLM", {"head_dim": 32}, change=gguf_files.llama),
    "llama with biases": Case(
        "llama",
        "LlamaForCausalLM",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
        lambda config: {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        gguf_files.llama,
    ),
    "llama 3.1": Case(
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 64, "rope_parameters": LLAMA3},
        change=gguf_files.llama,
        extra=gguf_files.llama3_factors,
    ),
    "mixtral": Case(
        "llama",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        change=gguf_files.llama,
    ),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 with yarn": Case(
        "qwen2", "Qwen2ForCausalLM", {"rope_parameters": YARN}, gguf_files.yarn_keys
    ),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen2moe": Case(
        "qwen2moe", "Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 96}
    ),
    "qwen3moe": Case(
        "qwen3moe", "Qwen3MoeForCausalLM", MOE | {"head_dim": 32, "norm_topk_prob": True}
    ),
    "gemma": Case("gemma", "GemmaForCausalLM", {"head_dim": 32}, change=gguf_files.gemma),
    "gemma2": Case(
        "gemma2",
        "Gemma2ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 3},
        soft_caps,
        gguf_files.gemma,
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 7},
        change=gguf_files.gemma,
    ),
    "phi3": Case(
        "phi3",
        "Phi3ForCausalLM",
        {"sliding_window": 63},
        lambda config: {
            "rope.scaling.original_context_length": config.original_max_position_embeddings
        },
    ),
    "phi3 for long contexts": Case(
        "phi3",
        "Phi3ForCausalLM",
        {"rope_parameters": LONG, "original_max_position_embeddings": 128},
        lambda config: {"rope.scaling.original_context_length": 128},
        extra=long_factors,
    ),
    "phi4-mini": Case(
        "phi3",
        "Phi3ForCausalLM",
        {
            "hidden_size": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
        },
        lambda config: {
            "rope.dimension_count": 24,
            "attention.sliding_window": 0,
            "rope.scaling.original_context_length": config.original_max_position_embeddings,
        },
    ),
    "gpt2": Case(
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 256},
        lambda config: {"feed_forward_length": config.n_inner},
        gguf_files.gpt2,
    ),
    "starcoder2": Case("starcoder2", "Starcoder2ForCausalLM"),
    "gptneox": Case(
        "gptneox",
        "GPTNeoXForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
            "use_parallel_residual": False,
        },
        lambda config: {"use_parallel_residual": False, "rope.dimension_count": 4},
        gguf_files.gpt_neox,
    ),
    "falcon": Case(
        "falcon",
        "FalconForCausalLM",
        {"multi_query": True, "num_kv_heads": 1, "ffn_hidden_size": 128},
        lambda config: {"attention.head_count_kv": 1},
        gguf_files.falcon,
    ),
    "falcon with two norms": Case(
        "falcon",
        "FalconForCausalLM",
        {"multi_query": False, "num_kv_heads": 2, "new_decoder_architecture": True},
        lambda config: {"attention.head_count_kv": 2},
        gguf_files.falcon,
    ),
    "command-r": Case(
        "command-r",
        "CohereForCausalLM",
        {"logit_scale": 0.0625},
        lambda config: {"logit_scale": config.logit_scale, "rope.scaling.type": "none"},
    ),
    "command-r with norms": Case(
        "command-r",
        "CohereForCausalLM",
        {"logit_scale": 0.25, "use_qk_norm": True},
        lambda config: {"logit_scale": config.logit_scale},
    ),
    "olmo2": Case("olmo2", "Olmo2ForCausalLM"),
    "olmo3": Case(
        "olmo2",
        "Olmo3ForCausalLM",
        {"num_hidden_layers": 5, "sliding_window": 64},
        lambda config: {
            "attention.sliding_window_pattern": [
                kind == "sliding_attention" for kind in config.layer_types
            ]
        },
    ),
    "olmoe": Case(
        "olmoe", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": None}
    ),
    "granite": Case(
        "granite",
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
        },
        granite_scales,
        gguf_files.llama,
    ),
    "smollm3": Case(
        "smollm3", "SmolLM3ForCausalLM", {"num_hidden_layers": 5}, change=gguf_files.llama
    ),
    "deepseek2": Case(
        "deepseek2",
        "DeepseekV2ForCausalLM",
        LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        latent_keys,
    ),
    "deepseek3": Case(
        "deepseek2",
        "DeepseekV3ForCausalLM",
        LATENT
        | {
            "q_lora_rank": 48,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": YARN
            | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        latent_keys,
    ),
    "bert": Case(
        "bert",
        "BertModel",
        {"max_position_embeddings": 64},
        lambda config: {"tokenizer.ggml.model": "bert", "pooling_type": 2},
    ),
}
# What a file has no key for, and what it calls by another name.
UNTOLD = {"architectures", "transformers_version", "dtype", "use_cache", "sep_token_id"}
UNTOLD_OF = {
    "falcon": {"num_key_value_heads", "intermediate_size"},  # of no use there
    "falcon with two norms": {"num_key_value_heads", "intermediate_size"},
    "gpt2": {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    | {"max_position_embeddings", "intermediate_size"},
}


def plain_values(tensor: StoredTensor | CutTensor) -> Any:
    """The numbers of a plain tensor, in its shape."""
    whole = tensor.copied() if isinstance(tensor, CutTensor) else tensor
    assert whole.data.nbytes == tensor.num_bytes
    return gguf_model._numbers(whole)


def is_of_a_file(data: Any) -> bool:
    """Whether the bytes of an array are those of a mapping."""
    while isinstance(data, np.ndarray):
        data = data.base
    return isinstance(data, memoryview | mmap.mmap)


@pytest.mark.filterwarnings("ignore")  # of transformers, about sizes as small as these
@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", CASES)
def test_weights_come_back(tmp_path: Path, name: str, type_name: str) -> None:
    case = CASES[name]
    file, weights, _ = make(case, tmp_path, type_name)
    [(part, tensors)] = gguf_model.open_tensors(file)
    assert part == file
    found = {tensor.name: tensor for tensor in tensors}
    untold = {key for key in weights if key.startswith("pooler.")}  # the converter drops it
    assert set(found) == set(weights) - untold
    forms = gguf_model.forms(file)
    assert set(forms) == {key for key, one in found.items() if isinstance(one, CodedTensor)}
    for key, tensor in found.items():
        wanted = weights[key]
        if isinstance(tensor, CodedTensor):
            assert type_name == "Q8_0"
            assert forms[key] == tensor.form == ggml.form_of("Q8_0")
            wanted = wanted.T if case.arch == "gpt2" and ".h." in key else wanted
            kind = gguf.GGMLQuantizationType.Q8_0
            wanted = dequantize(quantize(np.ascontiguousarray(wanted), kind), kind)
            values = tensor.values()
        else:
            values = plain_values(tensor)
        assert values.shape == wanted.shape, key
        # Numbers of bfloat16 survive float16 and norms that are 1 + w; joined latents their codes.
        limit = 0.01 if "kv_b_proj" in key and type_name == "Q8_0" else 1e-6
        assert np.abs(values - wanted).max() <= limit, key
    name = gguf_model.precision_name(file)
    assert name == ("GGUF, Q8_0" if type_name == "Q8_0" else "")
    assert len(forms) > 3 or type_name != "Q8_0"
    assert gguf_model.weight_files(file) == [file]
    for one in tensors:
        if isinstance(one, StoredTensor):  # memory of our own would be lost when it is given back
            assert one.is_mapped == is_of_a_file(one.data), one.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_configs_come_back(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    file, _, wanted = make(case, tmp_path, "F32")
    config = gguf_model.read_config(file)
    json.dumps(config)
    assert config["architectures"] == [case.model]
    assert config.pop("pooling_type", "cls") == "cls"
    theirs = getattr(transformers, case.model).config_class(**config).to_dict()
    for key in wanted.keys() - UNTOLD - UNTOLD_OF.get(name, set()):
        assert theirs[key] == wanted[key], key
    assert config["dtype"] == "float32"


def test_names_are_those_of_the_package() -> None:
    """No architecture's tensor is forgotten, by the package's lists of what each can have."""
    left_out = {"rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd"}
    left_out |= {"cls", "cls.output", "attn_gate"}
    names = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    models = {(case.arch, case.model) for case in CASES.values()} | {
        ("gpt-oss", "GptOssForCausalLM")
    }
    either = {
        "LlamaForCausalLM": {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"},
        "MixtralForCausalLM": {"ffn_gate", "ffn_up", "ffn_down"},
        "Phi3ForCausalLM": {"attn_q", "attn_k", "attn_v"},
        "BertModel": {"attn_qkv", "output_norm"},
        "FalconForCausalLM": {"attn_norm_2"},
        "DeepseekV2ForCausalLM": set(),
    }
    assert {model for _, model in models} == set(LAYOUTS)
    for arch, model in models:
        for tensor in gguf.MODEL_TENSORS[names[arch]]:
            name = gguf.TENSOR_NAMES[tensor].format(bid=1)
            place = place_of(f"{name}.bias" if "exp_probs_b" in name else f"{name}.weight")
            assert place is not None
            if place.part not in left_out | either.get(model, set()):
                assert LAYOUTS[model].name(place) is not None, (model, name)


def gpt_oss_file(directory: Path) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """GPT-OSS's experts in MXFP4, which no random model of transformers has."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(directory / "a.gguf", "gpt-oss")
    for key, number in {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 96,
        "expert_feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.sliding_window": 128,
        "expert_count": 3,
        "expert_used_count": 2,
        "rope.scaling.original_context_length": 128,
    }.items():
        writer.add_uint32(f"gpt-oss.{key}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(150000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    kind = gguf.GGMLQuantizationType.MXFP4
    wanted = {}
    for part, shape in (("gate", (3, 96, 64)), ("up", (3, 96, 64)), ("down", (3, 64, 96))):
        data = quantize(generator.standard_normal(shape, np.float32), kind)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", data, raw_dtype=kind)
        bias = generator.standard_normal(shape[:2], np.float32)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.bias", bias)
        for expert, numbers in enumerate(dequantize(data, kind)):
            name = f"model.layers.0.mlp.experts.{expert}.{part}_proj"
            wanted |= {f"{name}.weight": numbers, f"{name}.bias": bias[expert]}
    for name, theirs in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.attn_sinks.weight", "model.layers.0.self_attn.sinks"),
        ("blk.0.ffn_gate_inp.weight", "model.layers.0.mlp.router.weight"),
        ("blk.0.ffn_gate_inp.bias", "model.layers.0.mlp.router.bias"),
        ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
    ):
        numbers = generator.standard_normal((3, 64), np.float32)
        writer.add_tensor(name, numbers)
        wanted[theirs] = numbers
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "a.gguf", wanted


def test_gpt_oss(tmp_path: Path) -> None:
    file, wanted = gpt_oss_file(tmp_path)
    [(_, tensors)] = gguf_model.open_tensors(file)
    assert {tensor.name for tensor in tensors} == set(wanted)
    for tensor in tensors:
        is_coded = isinstance(tensor, CodedTensor)
        values = tensor.values() if is_coded else plain_values(tensor)
        assert np.array_equal(values, wanted[tensor.name])
    assert set(gguf_model.forms(file).values()) == {ggml.form_of("MXFP4")}
    config = gguf_model.read_config(file)
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert (config["num_local_experts"], config["intermediate_size"]) == (3, 96)
    assert config["rope_scaling"]["truncate"] is False
    assert config["rope_scaling"]["factor"] == 32.0
    assert config["layer_types"] == ["sliding_attention"]
    assert config["attention_bias"] is True


def test_other_rules_of_llama3(tmp_path: Path) -> None:
    """Whatever rule made the factors: what the config makes of them are the same frequencies."""
    rule = LLAMA3 | {
        "factor": 32.0,
        "high_freq_factor": 6.0,
        "low_freq_factor": 2.0,
        "original_max_position_embeddings": 5000,
    }
    case = CASES["llama 3.1"]
    changed = Case(
        case.arch,
        case.model,
        {"head_dim": 128, "rope_parameters": rule},
        change=case.change,
        extra=case.extra,
    )
    file, _, _ = make(changed, tmp_path, "F32")
    found = gguf_model.read_config(file)["rope_scaling"]
    names = ("factor", "low_freq_factor", "high_freq_factor")

    def scaled(told: dict[str, Any]) -> Any:
        numbers = {name: told[name] for name in names}
        length = told["original_max_position_embeddings"]
        scaling = Llama3Scaling(**numbers, original_context_len=length)
        return frequencies(128, 500000.0, scaling)

    assert found["rope_type"] == "llama3"
    assert np.allclose(scaled(found), scaled(rule), rtol=1e-4)


def test_factors_of_no_rule(tmp_path: Path) -> None:
    factors = np.linspace(1, 7, 8, dtype=np.float32) ** 2
    changed = Case(
        "llama",
        "LlamaForCausalLM",
        change=gguf_files.llama,
        extra=lambda config: {"rope_freqs.weight": factors},
    )
    file, _, _ = make(changed, tmp_path, "F32")
    found = gguf_model.read_config(file)["rope_scaling"]
    assert found["rope_type"] == "longrope"
    assert found["long_factor"] == found["short_factor"]
    assert np.array_equal(np.array(found["long_factor"], np.float32), factors)
    assert found["attention_factor"] == 1.0


def broken(directory: Path, change: Callable[[gguf.GGUFWriter], None], arch: str = "llama") -> Path:
    """A Llama of one layer, with something else than usual."""
    writer = gguf.GGUFWriter(directory / "a.gguf", arch)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "a.gguf"


def with_block(writer: gguf.GGUFWriter, name: str, numbers: Any, kind: Any = None) -> None:
    writer.add_block_count(1)
    writer.add_tensor(name, numbers, raw_dtype=kind)


ZEROS = np.zeros((64, 64), np.float32)
BROKEN: dict[str, Callable[[gguf.GGUFWriter], None]] = {
    "`llama.block_count` is missing": lambda writer: None,
    "`llama.block_count` is `5000`": lambda writer: writer.add_block_count(5000),
    "`llama.block_count` is `x`": lambda writer: writer.add_string("llama.block_count", "x"),
    "`blk.0.attn_r.weight` in .* has no place": lambda writer: with_block(
        writer, "blk.0.attn_r.weight", ZEROS
    ),
    "`blk.1.attn_q.weight` in .* has no place": lambda writer: with_block(
        writer, "blk.1.attn_q.weight", ZEROS
    ),
    "`blk.00.attn_q.weight` in .* has no place": lambda writer: with_block(
        writer, "blk.00.attn_q.weight", ZEROS
    ),
    "`strange` in .* is no name": lambda writer: with_block(writer, "strange", ZEROS),
    "is of shape `.6, 64.`, which `4` heads do not": lambda writer: with_block(
        writer, "blk.0.attn_q.weight", ZEROS[:6]
    ),
    "`blk.0.ffn_up.weight` is of ggml's type `IQ4_NL`": lambda writer: with_block(
        writer,
        "blk.0.ffn_up.weight",
        np.zeros((2, 18), np.uint8),
        gguf.GGMLQuantizationType.IQ4_NL,
    ),
    "`rope_freqs.weight` in .* is F32 of shape": lambda writer: with_block(
        writer, "rope_freqs.weight", np.ones(3, np.float32)
    ),
    "`rope_freqs.weight` in .* must be positive": lambda writer: with_block(
        writer, "rope_freqs.weight", np.zeros(8, np.float32)
    ),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken(tmp_path: Path, reason: str) -> None:
    file = broken(tmp_path, BROKEN[reason])
    with pytest.raises(ModelLoadError, match=reason):
        gguf_model.open_tensors(file)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.attention.head_count", 0, "`llama.attention.head_count` is `0`"),
        ("llama.rope.scaling.type", "odd", "`llama.rope.scaling.type` is `odd`"),
        ("llama.rope.scaling.type", "linear", "beside a tensor of frequency factors"),
        ("llama.rope.scaling.factor", 2.0, "`llama.rope.scaling.factor` is `2.0`"),
        ("llama.rope.freq_base", -1.0, "`llama.rope.freq_base` is `-1.0`"),
        ("llama.rope.freq_base", 0.0, "`llama.rope.freq_base` is `0.0`"),
        ("llama.rope.dimension_count", 2**17, "`llama.rope.dimension_count` is `131072`"),
        ("llama.attention.causal", False, "`llama.attention.causal` is `False`"),
        ("llama.pooling_type", 5, "`llama.pooling_type` is `5`"),
        ("llama.attention.key_length", 0, "`llama.attention.key_length` is `0`"),
        ("llama.attention.head_count_kv", [1, 2], "has `2` entries"),
        ("tokenizer.ggml.eos_token_id", 2, "below the number of tokens, `2`"),
        ("tokenizer.ggml.eos_token_id", -1, "`tokenizer.ggml.eos_token_id` is `-1`"),
    ],
)
def test_wrong_values(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.kv_data[0].pop(key, None)
        kinds = {bool: "bool", float: "float32", int: "int32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
        if key == "llama.rope.scaling.type":
            writer.add_rope_scaling_factor(2.0)
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))

    with pytest.raises(ModelLoadError, match=reason):
        gguf_model.read_config(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, None),
        ({"scaling.factor": 4.0}, 4.0),  # llama.cpp takes "linear" where no type is named
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.type": "linear", "scale_linear": 2.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0, "scale_linear": 2.0}, None),
        ({"scaling.factor": 0.0}, None),
    ],
)
def test_linear_scaling(tmp_path: Path, keys: dict[str, Any], factor: float | None) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        for key, value in keys.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"llama.rope.{key}", value)

    wanted = None if factor is None else {"rope_type": "linear", "factor": factor}
    assert gguf_model.read_config(broken(tmp_path, change)).get("rope_scaling") == wanted


def test_longrope_without_its_factors(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    with pytest.raises(ModelLoadError, match="is `longrope`, without the tensors"):
        gguf_model.read_config(broken(tmp_path, change))


def test_more_experts_than_there_can_be(tmp_path: Path) -> None:
    """However small they are: each would be an object of its own."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_expert_count(2**20)
        writer.add_expert_used_count(1)
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2**20, 1, 1), np.float32))

    with pytest.raises(ModelLoadError, match="may be `262144` matrices of experts"):
        gguf_model.read_config(broken(tmp_path, change))


def test_unknown_architecture(tmp_path: Path) -> None:
    file = broken(tmp_path, lambda writer: None, arch="rwkv7")
    with pytest.raises(UnsupportedModel, match="architecture` is `rwkv7`") as caught:
        gguf_model.read_config(file)
    assert caught.value.hint is not None
    assert "`qwen2`" in caught.value.hint


def test_per_layer_numbers_that_agree(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(2)
        writer.add_head_count_kv([2, 2])

    config = gguf_model.read_config(broken(tmp_path, change))
    assert config["num_key_value_heads"] == 2
    assert config["num_attention_heads"] == 4


def test_pooling(tmp_path: Path) -> None:
    """Embedding models that are decoders tell it too."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_pooling_type(gguf.PoolingType.MEAN)

    assert gguf_model.read_config(broken(tmp_path, change))["pooling_type"] == "mean"


def test_ends(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.kv_data[0].pop("tokenizer.ggml.tokens")
        writer.add_token_list(["a", "<|endoftext|>", "<|im_end|>", "b"])
        writer.add_eos_token_id(2)

    assert gguf_model.read_config(broken(tmp_path, change))["eos_token_id"] == [2, 1]


@pytest.mark.parametrize(
    ("arch", "num_layers", "scalar"),
    [("gemma2", 46, 16), ("gemma2", 42, 32), ("gemma3", 62, 16), ("gemma3", 48, 32)],
)
def test_scores_of_gemma_27b(tmp_path: Path, arch: str, num_layers: int, scalar: int) -> None:
    """The largest of each has no key of its own for it; it is known by its layers."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(num_layers)
        writer.add_key_length(32)

    config = gguf_model.read_config(broken(tmp_path, change, arch=arch))
    assert config["query_pre_attn_scalar"] == scalar
    assert config["rope_theta"] == (1e6 if arch == "gemma3" else 1e4)


HARMONY = ["<|end|>", "<|return|>", "<|call|>"]


@pytest.mark.parametrize(
    ("tokens", "ends"), [(HARMONY, [1, 2]), (HARMONY[:2], [0, 1]), ([*HARMONY[1:], "a"], [0, 1])]
)
def test_ends_of_harmony(tmp_path: Path, tokens: list[str], ends: list[int]) -> None:
    """Where answers have several messages, the end of one is not the end of all."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.kv_data[0].pop("tokenizer.ggml.tokens")
        writer.add_token_list(tokens)

    assert gguf_model.read_config(broken(tmp_path, change))["eos_token_id"] == ends


def test_latents_that_do_not_fit(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
        writer.add_rope_dimension_count(8)
        writer.add_key_length(24)
        writer.add_value_length(16)
        writer.add_q_lora_rank(8)
        writer.add_kv_lora_rank(8)
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 4, 64), np.float32))
        writer.add_tensor("blk.0.attn_k_b.weight", np.zeros((4, 8, 16), np.float32))
        writer.add_tensor("blk.0.attn_v_b.weight", np.zeros((4, 16, 9), np.float32))

    with pytest.raises(ModelLoadError, match="which do not fit together"):
        gguf_model.read_config(broken(tmp_path, change, arch="deepseek2"))


def test_parts(tmp_path: Path) -> None:
    """Weights of a split file come by part."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", ZEROS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_model.open_tensors(tmp_path / "m-00001-of-00002.gguf")
    assert [(file.name, [tensor.name for tensor in tensors]) for file, tensors in found] == [
        ("m-00001-of-00002.gguf", ["model.embed_tokens.weight"]),
        ("m-00002-of-00002.gguf", ["model.layers.0.mlp.up_proj.weight"]),
    ]


def test_names_for_people(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        for name, kind, num_bytes in (
            ("attn_q", "Q8_0", 68),
            ("ffn_up", "Q4_K", 144),
            ("ffn_down", "Q6_K", 210),
        ):
            data = np.zeros((64, num_bytes), np.uint8)
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=number)

    file = broken(tmp_path, change)
    assert gguf_model.precision_name(file) == "GGUF, Q6_K, Q4_K and Q8_0"
    assert read_generation_eos(file) == ()


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = broken(tmp_path, lambda writer: writer.add_block_count(1))
    config = gguf_model.read_config(file)
    config["num_hidden_layers"] = 7  # whose it is does not change the next one
    assert gguf_model.read_config(file)["num_hidden_layers"] == 1
    file.unlink()
    assert (
        gguf_model.read_config(broken(tmp_path, lambda writer: writer.add_block_count(20)))[
            "num_hidden_layers"
        ]
        == 20
    )
    file.unlink()
    with pytest.raises(ModelLoadError, match="No such file"):
        gguf_model.read_config(file)


def test_ends_of_a_file(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_eos_token_id(1)

    assert read_generation_eos(broken(tmp_path, change)) == (1,)


def test_can_be() -> None:
    """The helper quantizes what it should: else the tests above would prove less."""
    assert can_be("Q8_0", "blk.0.attn_q.weight", ZEROS)
    assert not can_be("Q8_0", "blk.0.attn_norm.weight", ZEROS[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file with something of everything, and few bytes of data."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_head_count_kv([2])
        writer.add_sliding_window(8)
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_tensor("blk.0.attn_q.weight", ZEROS[:, :2])
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 3, 2), np.float32))
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    return broken(tmp_path_factory.mktemp("small"), change).read_bytes()


def test_any_byte_of_the_header_changed(tmp_path: Path, small: bytes) -> None:
    """It opens, or is refused with one sentence."""
    end = small.rindex(b"rope_freqs.weight") + 60
    file = tmp_path / "a.gguf"
    num_opened = 0
    for at in range(end):
        byte = (0, 0xFF, small[at] ^ 1, small[at] ^ 0x80)[at % 4]
        file.write_bytes(small[:at] + bytes([byte]) + small[at + 1 :])
        try:
            gguf_model.read_config(file)
            gguf_model.open_tensors(file)
            num_opened += 1
        except ModelLoadError as error:
            str(error).encode()
    assert num_opened > 20

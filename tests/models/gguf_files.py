"""GGUF files made of random transformers models, as llama.cpp's converter makes them.

What the converter does to weights is written here once more, from its source, and the names are
those of the `gguf` package's own tables: nothing of the reader is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

import gguf

Numbers = NDArray[np.float32]
Weights = dict[str, Numbers]
Change = Callable[[str, Numbers, Any], Numbers]  # of a name of transformers, a weight, the config
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Case:
    """One architecture: how to make a model, and what the converter does with it."""

    arch: str  # ggml's
    model: str  # transformers' class
    config: dict[str, Any] = field(default_factory=dict)
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}  # beside the usual ones
    change: Change = lambda name, numbers, config: numbers
    extra: Callable[[Any], Weights] = lambda config: {}  # tensors by ggml's names


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(case: Case, directory: Path, type_name: str) -> tuple[Path, Weights, dict[str, Any]]:
    """Write a model, as safetensors and as GGUF; its file, its weights, its config."""
    torch.manual_seed(0)
    model_class = getattr(transformers, case.model)
    config = model_class.config_class(**(SIZES | case.config))
    model = model_class(config)
    with torch.no_grad():
        for numbers in (*model.parameters(), *model.buffers()):
            if numbers.dtype == torch.float32:
                numbers.copy_((torch.randn_like(numbers) / 4).bfloat16())
    model.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    file = directory / "model.gguf"
    writer = gguf.GGUFWriter(file, case.arch)
    for key, value in (usual_keys(config) | case.keys(config)).items():
        add(writer, key if key.startswith("tokenizer.") else f"{case.arch}.{key}", value)
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    for name, numbers in (tensors(case, weights, config) | case.extra(config)).items():
        kind = type_name if can_be(type_name, name, numbers) else "F32"
        data = quantize(np.ascontiguousarray(numbers), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, weights, config.to_dict()


def can_be(type_name: str, name: str, numbers: Numbers) -> bool:
    """Whether the converter stores a tensor in that type."""
    is_matrix = numbers.ndim > 1 and "norm" not in name
    return is_matrix and (type_name != "Q8_0" or numbers.shape[-1] % 32 == 0)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def usual_keys(config: Any) -> dict[str, Any]:
    """What `TextModel.set_gguf_parameters` writes of every model."""
    told = config.to_dict()
    names = {
        "max_position_embeddings": "context_length",
        "n_positions": "context_length",
        "hidden_size": "embedding_length",
        "n_embd": "embedding_length",
        "num_hidden_layers": "block_count",
        "n_layer": "block_count",
        "intermediate_size": "feed_forward_length",
        "ffn_hidden_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "n_head": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "num_kv_heads": "attention.head_count_kv",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
        "norm_epsilon": "attention.layer_norm_epsilon",
        "num_local_experts": "expert_count",
        "num_experts": "expert_count",
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "head_dim": "attention.key_length",
        "sliding_window": "attention.sliding_window",
    }
    found = {new: told[old] for old, new in names.items() if told.get(old) is not None}
    rope = told.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        found["rope.freq_base"] = rope["rope_theta"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        found[f"tokenizer.ggml.{key}_token_id"] = told[f"{name}_token_id"]
    return found


def tensors(case: Case, weights: Weights, config: Any) -> Weights:
    """Weights as the converter names and changes them; experts stacked."""
    names = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(names[case.arch], config.num_hidden_layers)
    found: Weights = {}
    stacks: dict[str, dict[int, Numbers]] = {}
    for name, numbers in weights.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = numbers
        else:
            found[name] = case.change(name, numbers, config)
    for name, experts in stacks.items():
        found[name] = np.stack([experts[number] for number in sorted(experts)])
    return {
        ggml_name(known, name): numbers
        for name, numbers in found.items()
        if not name.startswith("pooler.")  # which is dropped
    }


def ggml_name(known: gguf.TensorNameMap, name: str) -> str:
    for old, new in (
        ("correction_bias", "correction.bias"),
        ("model.layers", "layers"),
        ("block_sparse_moe.ex", "feed_forward.ex"),
    ):
        name = name.replace(old, new)
    for candidate in (name, name.replace("layers", "model.layers"), f"model.{name}"):
        found: str | None = known.get_name(candidate, try_suffixes=(".weight", ".bias"))
        if found is not None:
            return found
    raise KeyError(name)


def permuted(numbers: Numbers, num_heads: int) -> Numbers:
    """Rows of each head: the two halves by turns."""
    shape = (num_heads, 2, numbers.shape[0] // num_heads // 2, *numbers.shape[1:])
    return numbers.reshape(shape).swapaxes(1, 2).reshape(numbers.shape)


def llama(name: str, numbers: Numbers, config: Any) -> Numbers:
    if ".q_proj." in name:
        return permuted(numbers, config.num_attention_heads)
    return permuted(numbers, config.num_key_value_heads) if ".k_proj." in name else numbers


def gemma(name: str, numbers: Numbers, config: Any) -> Numbers:
    return numbers + np.float32(1) if name.endswith("norm.weight") else numbers


def gpt2(name: str, numbers: Numbers, config: Any) -> Numbers:
    return numbers.T if re.search(r"c_(attn|proj|fc)\.weight", name) else numbers


def gpt_neox(name: str, numbers: Numbers, config: Any) -> Numbers:
    if "query_key_value" not in name:
        return numbers
    parts = numbers.reshape(config.num_attention_heads, 3, -1, *numbers.shape[1:])
    return np.concatenate([parts[:, part].reshape(-1, *numbers.shape[1:]) for part in range(3)])


def falcon(name: str, numbers: Numbers, config: Any) -> Numbers:
    if "query_key_value" not in name:
        return numbers
    num_heads, num_kv_heads = config.num_attention_heads, config.num_kv_heads
    size = config.hidden_size
    head_dim = size // num_heads
    parts = numbers.reshape(num_kv_heads, num_heads // num_kv_heads + 2, head_dim, size)
    queries, keys, values = parts[:, :-2], parts[:, -2], parts[:, -1]
    return np.concatenate([part.reshape(-1, size) for part in (queries, keys, values)])


def llama3_factors(config: Any) -> Weights:
    """The rule of Llama 3.1 as one factor for each frequency."""
    rope = config.rope_parameters
    factors = []
    for index in range(0, config.head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (index / config.head_dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = (rope["original_max_position_embeddings"] / wave - low) / (high - low)
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / (share + (1 - share) / rope["factor"]))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def yarn_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    for name in ("beta_fast", "beta_slow"):
        if name in rope:
            found[f"rope.scaling.yarn_{name}"] = rope[name]
    return found

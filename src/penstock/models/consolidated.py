"""Checkpoints in Mistral's own form: `params.json` beside `consolidated*.safetensors`.

Owns what its keys and its names of weights are called by transformers, and the order of the rows of
queries and keys, whose RoPE turns neighbours here and halves there. The form is that of
https://github.com/mistralai/mistral-inference; what keys mean besides is from transformers'
`convert_mistral_weights_to_hf.py` and from vLLM's `configs/mistral.py`. Knows no architecture and
no backend.

Invariant: a key that could change the result and is not read is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from penstock.models.config import MAX_LAYERS, ConfigReader
from penstock.models.rope import FULL, SLIDING
from penstock.models.safetensors import map_tensors
from penstock.quantization.codes import CutTensor, Found, StoredTensor

BOS_ID, EOS_ID = 1, 2  # of every tokenizer of Mistral's, SentencePiece and Tekken
_CONTEXT_LEN = 32768  # where it is not said: that of Mistral 7B and Mixtral 8x7B
_READ = frozenset(
    {
        "activation", "dim", "dtype", "head_dim", "hidden_dim", "llama_4_scaling", "max_seq_len",
        "max_position_embeddings", "model_type", "moe", "n_heads", "n_kv_heads", "n_layers",
        "norm_eps", "rope_theta", "sliding_window", "tied_embeddings", "vocab_size", "yarn",
    }
)  # fmt: skip
# What says nothing about the text part, or nothing at all about a result.
_OTHER_PARTS = frozenset({"vision_encoder", "multimodal", "max_batch_size", "causal"})
_OTHER_WEIGHTS = (
    "vision_encoder.",
    "vision_language_adapter.",
    "patch_merger.",
    "pre_mm_projector_norm.",
)
_ALL_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = re.compile(r"layers\.(\d{1,5})\.(.+)\.weight")
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
    "block_sparse_moe.gate": "block_sparse_moe.gate",
}
_EXPERT = re.compile(r"(?:feed_forward|block_sparse_moe)\.(experts\.\d{1,6}\.w[123])")
_HEADS: Final = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_KINDS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}


def config_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `params.json` as a config of transformers has it, bos and eos ids included.

    Of a model that also reads images it is that of the part that reads and writes text.

    Raises:
        UnsupportedModel: a key is missing, or has a value that is wrong or not implemented.
    """
    reader = ConfigReader(params)
    reader.expect("model_type", "transformer")
    reader.refuse(*sorted(params.keys() - _READ - _OTHER_PARTS))  # "quantization" among them
    num_heads = reader.size("n_heads")
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": reader.size("dim"),
        "intermediate_size": reader.size("hidden_dim"),
        "num_hidden_layers": reader.size("n_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": reader.size("n_kv_heads", num_heads),
        "head_dim": reader.size("head_dim", max(reader.size("dim") // num_heads, 1)),
        "hidden_act": reader.value(str, "activation", "silu"),
        "rms_norm_eps": reader.factor("norm_eps", 1e-5),
        "max_position_embeddings": reader.size(
            "max_position_embeddings", reader.size("max_seq_len", _CONTEXT_LEN)
        ),
        "tie_word_embeddings": reader.flag("tied_embeddings"),
        "dtype": reader.value(str, "dtype", "bfloat16"),
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    if config["vocab_size"] <= EOS_ID:
        raise reader.error("vocab_size", f"above `{EOS_ID}`, the id that ends a text")
    config |= _windows(reader, config["num_hidden_layers"]) | _experts(reader)
    return config | _rope(reader, config)


def _windows(reader: ConfigReader, num_layers: int) -> dict[str, Any]:
    """One window of all layers, or a pattern of windows and nulls that is repeated (Ministral)."""
    key = "sliding_window"
    if not reader.has(key):
        return {key: None}
    if reader.is_a(str, key):  # as some files have it
        text = reader.value(str, key)
        if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**40):
            raise reader.error(key, "a positive integer")
        return {key: int(text)}
    if not reader.is_a(list, key):
        return {key: reader.size(key)}
    pattern: list[Any] = reader.value(list, key)
    sizes = [size for size in pattern if size is not None]
    is_right = pattern and all(type(size) is int and size > 0 for size in sizes)
    if not is_right or len(set(sizes)) > 1 or num_layers % len(pattern):
        raise reader.error(
            key, f"a list of one size and of nulls, as long as a divisor of `{num_layers}`"
        )
    kinds = [FULL if size is None else SLIDING for size in pattern] * (num_layers // len(pattern))
    if not sizes:
        return {key: None}
    return {"architectures": ["MinistralForCausalLM"], key: sizes[0], "layer_types": kinds}


def _experts(reader: ConfigReader) -> dict[str, Any]:
    """Mixtral's; those of Mistral Large 3, which have more keys, are refused."""
    if not reader.has("moe"):
        return {}
    section = reader.section("moe")
    if section is None:
        raise reader.error("moe", "an object with `num_experts` and `num_experts_per_tok`")
    known = {"num_experts", "num_experts_per_tok"}
    section.refuse(*sorted(reader.value(dict, "moe").keys() - known))
    if reader.is_a(list, "sliding_window"):
        raise reader.error("sliding_window", "one size, in a model with experts")
    return {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": section.size("num_experts"),
        "num_experts_per_tok": section.size("num_experts_per_tok"),
    }


def _rope(reader: ConfigReader, config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE: what is not said is as in mistral-inference, where a window means the first model."""
    default = 10000.0 if config["sliding_window"] is not None else 1e6
    found: dict[str, Any] = {"rope_theta": reader.factor("rope_theta", default)}
    yarn = reader.section("yarn")
    scaled = reader.section("llama_4_scaling")
    if not yarn:
        if scaled:
            raise reader.error("llama_4_scaling", "absent without `yarn`")
        return {"rope_parameters": {"rope_type": "default", **found}}
    names = {"factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"}
    yarn.refuse(*sorted(reader.value(dict, "yarn").keys() - names))
    original_len = yarn.size("original_max_position_embeddings")
    found |= {
        "rope_type": "yarn",
        "factor": yarn.factor("factor"),
        "original_max_position_embeddings": original_len,
        "beta_fast": yarn.factor("beta", 32.0),
        "beta_slow": yarn.factor("alpha", 1.0),
    }
    if not yarn.flag("apply_scale", True):
        found["attention_factor"] = 1.0
    if not scaled:
        return {"rope_parameters": found}
    if config["architectures"] != ["MistralForCausalLM"]:
        raise reader.error("llama_4_scaling", "absent in such a model")
    found["llama_4_scaling_beta"] = scaled.factor("beta")
    if scaled.size("original_max_position_embeddings") != original_len:
        raise scaled.error("original_max_position_embeddings", f"`{original_len}`, as in `yarn`")
    return {"architectures": ["Ministral3ForCausalLM"], "rope_parameters": found}


def open_tensors(
    files: Sequence[Path], config: Mapping[str, Any]
) -> list[tuple[Path, Sequence[Found]]]:
    """The weights of the text part by file, mapped, named and arranged as transformers has them.

    `config` is what `config_of` gives. A tensor of an unknown name keeps it.

    Raises:
        ModelLoadError: a file is missing or damaged.
    """
    return [
        (
            file,
            [
                _arranged(tensor._replace(name=name_of(tensor.name)), config)
                for tensor in map_tensors(file)
                if not tensor.name.startswith(_OTHER_WEIGHTS)
            ],
        )
        for file in files
    ]


def name_of(name: str) -> str:
    """What transformers calls a weight; an unknown name is its own."""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in _ALL_NAMES:
        return f"{_ALL_NAMES[stem]}.weight"
    if (match := _BLOCK.fullmatch(name)) is None:
        return name
    part = _BLOCK_NAMES.get(match[2])
    if part is None and (expert := _EXPERT.fullmatch(match[2])):
        part = f"block_sparse_moe.{expert[1]}"
    return name if part is None else f"model.layers.{match[1]}.{part}.weight"


def _arranged(tensor: StoredTensor, config: Mapping[str, Any]) -> Found:
    """Queries and keys whose heads have the two halves of each pair side by side: halves."""
    key = _HEADS.get(tensor.name.split(".")[-2] if "." in tensor.name else "")
    if key is None or len(tensor.shape) != 2 or tensor.dtype not in _KINDS:
        return tensor
    num_rows, num_heads = tensor.shape[0], config[key]
    if num_rows != num_heads * config["head_dim"] or config["head_dim"] % 2:
        return tensor  # the loader says what is wrong with it
    numbers = tensor.data.view(_KINDS[tensor.dtype])
    turned = numbers.reshape(num_heads, num_rows // num_heads // 2, 2, tensor.shape[1])
    return CutTensor(tensor.name, tensor.dtype, tensor.shape, turned.swapaxes(1, 2))

"""What the tensors of a GGUF file are called in the checkpoint that it was made of.

Owns the tables from ggml's names (llama.cpp's `gguf-py/gguf/constants.py` and `tensor_mapping.py`
are their source) to those of transformers. Knows no files. Invariant: a tensor that is in no table
is not passed over: who asks for it gets None, and refuses the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_IN_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.+)\.(weight|bias)")
_OUTSIDE = re.compile(r"(.+)\.(weight|bias)")


class Place(NamedTuple):
    """Where a tensor is: in which block, if any, as which part of it."""

    block: int | None
    part: str  # ggml's name, without block and suffix: "attn_q"
    suffix: str  # "weight" or "bias"


class Layout(NamedTuple):
    """The names of one architecture, by ggml's."""

    block: str  # of a block, with {} for its number
    outside: dict[str, str]
    inside: dict[str, str]  # without the block's own; {} stands for the number of an expert
    whole: Mapping[str, str] = MappingProxyType({})  # likewise, names of another suffix

    def name(self, place: Place) -> str | None:
        """transformers' name of a tensor; None if the architecture has no such tensor."""
        if place.block is None:
            found = self.outside.get(place.part)
            return None if found is None else f"{found}.{place.suffix}"
        block = self.block.format(place.block)
        whole = self.whole.get(f"{place.part}.{place.suffix}")
        if whole is not None:
            return f"{block}.{whole}"
        found = self.inside.get(place.part)
        return None if found is None else f"{block}.{found}.{place.suffix}"


def place_of(name: str) -> Place | None:
    """What ggml's name of a tensor says; None if it is no such name."""
    if match := _IN_BLOCK.fullmatch(name):
        return Place(int(match[1]), match[2], match[3])
    if match := _OUTSIDE.fullmatch(name):
        return Place(None, match[1], match[2])
    return None


_OUTSIDE_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_DEEPSEEK = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj",  # two parts of it
    "attn_v_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_BLOCK = "model.layers.{}"
_DENSE = _NORMS | _ATTENTION | _MLP
_GEMMA2 = _NORMS_BEHIND | _ATTENTION | _MLP | {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}  # fmt: skip
_JOINED = {  # of GPT-NeoX, and but for "self_" of Falcon
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON = {
    part: name.replace("attention.", "self_attention.") for part, name in _JOINED.items()
} | {"attn_norm": "input_layernorm"}

_LLAMA = Layout(_BLOCK, _OUTSIDE_LLAMA, _DENSE)
_GEMMA = Layout(_BLOCK, _OUTSIDE_LLAMA, _GEMMA2)

LAYOUTS: dict[str, Layout] = {  # by what transformers calls the architecture
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "CohereForCausalLM",
            "GraniteForCausalLM",
            "SmolLM3ForCausalLM",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM"), _GEMMA),
    **dict.fromkeys(
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        Layout(_BLOCK, _OUTSIDE_LLAMA, _NORMS_BEHIND | _ATTENTION | _MLP),
    ),
    "MixtralForCausalLM": Layout(_BLOCK, _OUTSIDE_LLAMA, _NORMS | _ATTENTION | _MIXTRAL),
    **dict.fromkeys(
        ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"),
        Layout(_BLOCK, _OUTSIDE_LLAMA, _DENSE | _EXPERTS | _QWEN_SHARED),
    ),
    **dict.fromkeys(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        Layout(
            _BLOCK,
            _OUTSIDE_LLAMA,
            _DENSE | _EXPERTS | _DEEPSEEK,
            {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
        ),
    ),
    "GptOssForCausalLM": Layout(
        _BLOCK,
        _OUTSIDE_LLAMA,
        _ATTENTION
        | _EXPERTS
        | {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        {"attn_sinks.weight": "self_attn.sinks"},
    ),
    "Phi3ForCausalLM": Layout(
        _BLOCK,
        _OUTSIDE_LLAMA,
        _NORMS
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "Starcoder2ForCausalLM": Layout(
        _BLOCK,
        _OUTSIDE_LLAMA,
        _NORMS | _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "GPT2LMHeadModel": Layout(
        "transformer.h.{}",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
    "GPTNeoXForCausalLM": Layout(
        "gpt_neox.layers.{}",
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        _NORMS | _JOINED,
    ),
    "FalconForCausalLM": Layout(
        "transformer.h.{}",
        {
            "token_embd": "transformer.word_embeddings",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        _FALCON,
    ),
    "BertModel": Layout(
        "encoder.layer.{}",
        {
            "token_embd": "embeddings.word_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense",
            "layer_output_norm": "output.LayerNorm",
        },
    ),
}
# Falcon 40B has two norms in front of a block, side by side.
_TWO_NORMS = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}


def layout_of(architecture: str, parts: set[str]) -> Layout:
    """The names of an architecture in a file that has these parts."""
    layout = LAYOUTS[architecture]
    if architecture == "FalconForCausalLM" and "attn_norm_2" in parts:
        return layout._replace(inside=layout.inside | _TWO_NORMS)
    return layout

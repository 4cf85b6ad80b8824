"""Checkpoints as they are published, of architectures that transformers itself has not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_PLACES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
}


def published(architecture: str, path: Path) -> None:
    """Give a checkpoint that transformers saved the architecture's name, and its layout."""
    config = json.loads((path / "config.json").read_text())
    if architecture == "InternLM2ForCausalLM":
        _as_internlm2(path, config["num_attention_heads"], config["num_key_value_heads"])
        config["bias"] = config.pop("attention_bias")
    config["architectures"] = [architecture]
    (path / "config.json").write_text(json.dumps(config))


def _as_internlm2(path: Path, num_heads: int, num_kv_heads: int) -> None:
    """Join a Llama's queries, keys and values: for each KV head its queries, its key, its value."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors*")):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_", f".{kind}_")] for kind in "qkv"]
            size = len(tensor) // num_heads
            heads = [part.view(num_kv_heads, -1, size, *part.shape[1:]) for part in parts]
            joined = torch.cat(heads, 1).reshape(-1, *tensor.shape[1:])
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = joined
            continue
        for old, new in _PLACES.items():
            name = name.replace(old, new)
        made[name] = tensor
    save_file(made, path / "model.safetensors")

"""The metadata of a GGUF file as the config that Hugging Face has of the same model.

Owns the readings of ggml's keys that architectures share (llama.cpp's `conversion/base.py` is their
source). Knows no weights but their names and shapes. Invariant: every number comes from the file,
and one that is missing or of the wrong type is told by its key.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from penstock.errors import UnsupportedModel
from penstock.gguf.ends import end_ids
from penstock.gguf.metadata import Metadata
from penstock.gguf.reader import GGUFFile, GGUFTensor
from penstock.models.gguf.rope import rope_config

Config = dict[str, Any]
MAX_LAYERS = 4096
MAX_HEAD_DIM = 2**16
_DTYPES = {"F32": "float32", "F16": "float16"}
_POOLING = ("none", "mean", "cls", "last", "rank")  # by ggml's number


class Sources:
    """What the config of one file is read from.

    Attributes:
        told: the metadata below the architecture's name.
        tensors: by ggml's name.
    """

    def __init__(self, file: GGUFFile) -> None:
        whole = Metadata(file.files[0], file.metadata)
        self.whole = whole
        self.name = whole.text("general.architecture")
        self.told = whole.under(f"{self.name}.")
        self.tensors: dict[str, GGUFTensor] = {tensor.name: tensor for tensor in file.tensors}

    @cached_property
    def num_layers(self) -> int:
        """Blocks."""
        return self.told.integer("block_count", high=MAX_LAYERS)

    def uniform(self, key: str, default: int | None = None) -> int:
        """A number that is the same in all layers, though the file may list it for each."""
        value = self.told.integers(key, []) if isinstance(self._raw(key), np.ndarray) else []
        if value and len(set(value)) == 1:
            return value[0]
        if default is None:
            return self.told.integer(key, high=2**32)
        return self.told.integer(key, default, high=2**32)

    def rows(self, name: str, axis: int = 0) -> int:
        """A size of a tensor that must be there."""
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor.shape) <= axis:
            raise UnsupportedModel(
                f"`{self.told.file}` has no tensor `{name}` of at least `{axis + 1}` dimensions."
            )
        return tensor.shape[axis]

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        return name in self.tensors

    def in_layer(self, name: str) -> str | None:
        """The first tensor of that name that any layer has."""
        names = (f"blk.{layer}.{name}" for layer in range(self.num_layers))
        return next((found for found in names if found in self.tensors), None)

    def _raw(self, key: str) -> Any:
        return self.whole.raw(f"{self.name}.{key}")


def common(sources: Sources) -> Config:
    """What every architecture has, by the names that most have for it."""
    told = sources.told
    hidden_size = told.integer("embedding_length", high=2**32)
    num_heads = sources.uniform("attention.head_count")
    if not num_heads or not hidden_size:
        raise told.error("attention.head_count", "a positive number")
    context_len = told.integer("context_length")
    head_dim = told.integer("attention.key_length", hidden_size // num_heads, high=MAX_HEAD_DIM)
    if not head_dim:
        raise told.error("attention.key_length", "a positive number")
    rope_dim = told.integer("rope.dimension_count", head_dim, high=MAX_HEAD_DIM)
    token_ids = sources.whole.under("tokenizer.ggml.")
    ends = end_ids(sources.whole)
    embedding = sources.tensors.get("token_embd.weight")
    config: Config = {
        "vocab_size": sources.rows("token_embd.weight"),
        "hidden_size": hidden_size,
        "num_hidden_layers": sources.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": sources.uniform("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_len,
        "tie_word_embeddings": not sources.has("output.weight"),
        "attention_bias": sources.in_layer("attn_q.bias") is not None,
        "dtype": _DTYPES.get(embedding.type_name if embedding else "", "bfloat16"),
        **rope_config(told, sources.tensors, dim=rope_dim, context_len=context_len),
    }
    if "feed_forward_length" in told:
        config["intermediate_size"] = sources.uniform("feed_forward_length")
    if "attention.layer_norm_rms_epsilon" in told:
        config["rms_norm_eps"] = told.number("attention.layer_norm_rms_epsilon")
    for name, key in (("bos", "bos_token_id"), ("pad", "padding_token_id")):
        if key in token_ids:
            config[f"{name}_token_id"] = token_ids.integer(key)
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    if "pooling_type" in told:  # not of the config: beside it, in `1_Pooling/config.json`
        config["pooling_type"] = _POOLING[told.integer("pooling_type", high=len(_POOLING) - 1)]
    if sources.name != "bert" and not told.flag("attention.causal", True):
        raise told.error("attention.causal", "true, because no query sees later tokens here")
    if rope_dim != head_dim:
        config["partial_rotary_factor"] = rope_dim / head_dim
    return config

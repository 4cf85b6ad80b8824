"""The models that are measured: real shapes, random weights.

Owns the shapes, their Hugging Face configuration, what they weigh and what a token costs, and the
checkpoints. Weights are normal with a standard deviation of 0.02, as a fresh Llama's; speed does
not depend on them. Knows no engine.
Invariant: a checkpoint directory that exists is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHT_STD = 0.02
CHUNK_ROWS = 4096  # of a tensor drawn at once: bounds the memory of the draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    quantization_group: int  # weights a scale in engines that let one choose; divides every row

    @property
    def linear_parameters(self) -> int:
        """Weights of the blocks that every token is multiplied with."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Weights of the head, which are those of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in 16 bits."""
        return self.num_layers * self.num_kv_heads * self.head_dim * 2 * 2

    def attention_flops(self, context: float) -> float:
        """Operations of one token that attends to `context` tokens, in all layers."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    def config(self) -> dict[str, Any]:
        """config.json, as transformers writes it for a Llama."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_len,
            "mlp_bias": False,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": self.rope_scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, under the names of the Hugging Face layout."""
        size, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, size)
        for number in range(self.num_layers):
            block = f"model.layers.{number}"
            yield f"{block}.input_layernorm.weight", (size,)
            for part, rows in (("q", query), ("k", key), ("v", key)):
                yield f"{block}.self_attn.{part}_proj.weight", (rows, size)
            yield f"{block}.self_attn.o_proj.weight", (size, query)
            yield f"{block}.post_attention_layernorm.weight", (size,)
            for part in ("gate", "up"):
                yield f"{block}.mlp.{part}_proj.weight", (inner, size)
            yield f"{block}.mlp.down_proj.weight", (size, inner)
        yield "model.norm.weight", (size,)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="smollm2-135m",
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=49152,
            max_len=8192,
            rope_theta=100000.0,
            quantization_group=64,
        ),
        Shape(
            name="llama-3.2-1b",
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            vocab_size=128256,
            max_len=8192,  # of 131072: no cell needs more
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            quantization_group=128,
        ),
    )
}


def write_checkpoint(shape: Shape, directory: Path) -> Path:
    """The checkpoint of a shape in bfloat16, written if it is not there.

    The file is laid out by the safetensors format: the length of a JSON header as 8 bytes, the
    header, and the bytes of the tensors in the header's order.
    """
    target = directory / shape.name
    if target.exists():
        return target
    unfinished = directory / f"{shape.name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / "config.json").write_text(json.dumps(shape.config(), indent=1))
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    (unfinished / "generation_config.json").write_text(json.dumps(generation))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dimensions in shape.tensors():
        end = offset + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (unfinished / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dimensions in shape.tensors():
            for piece in _random_weights(rng, dimensions):
                file.write(piece.tobytes())
    unfinished.rename(target)
    return target


def _random_weights(
    rng: np.random.Generator, dimensions: tuple[int, ...]
) -> Iterator[NDArray[np.uint16]]:
    """The bfloat16 bits of a tensor, some rows at a time. A norm's weights are ones."""
    if len(dimensions) == 1:
        yield np.full(dimensions, 0x3F80, dtype=np.uint16)
        return
    rows, columns = dimensions
    for start in range(0, rows, CHUNK_ROWS):
        chunk = rng.standard_normal((min(CHUNK_ROWS, rows - start), columns), dtype=np.float32)
        bits = (chunk * np.float32(WEIGHT_STD)).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        yield (rounded >> np.uint32(16)).astype(np.uint16)  # to the nearest, ties to even

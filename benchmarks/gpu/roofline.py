"""What a step cannot do without: bytes that must be read, operations that must be done.

Pure arithmetic on a model's shapes. A decode step reads every weight of the blocks and of the head
once, and the keys and values of every request once; activations are free. A prefill multiplies
every token with the blocks, the last one with the head, and attends to itself and all before.
Knows no device: rates are measured elsewhere (Williams et al. 2009, the roofline model).
"""

from __future__ import annotations

from penstock.models.shapes import shapes_of
from penstock.models.spec import ITEM_BYTES, ModelSpec
from penstock.quantization.schemes import NONE, device_bytes, scheme

DTYPE = "bfloat16"  # what all models are computed in here


def block_parameters(spec: ModelSpec) -> int:
    """Weights of all blocks that every token is multiplied with."""
    matrices = shapes_of(spec).matrices
    return sum(matrix.num_parameters for matrix in matrices if matrix.role == "linear")


def head_parameters(spec: ModelSpec) -> int:
    """Weights of the head; tied ones are the embedding's."""
    return spec.vocab_size * spec.hidden_size


def weight_bytes(spec: ModelSpec, quantization: str = NONE) -> int:
    """Bytes of all that a decode step multiplies with, in a format of the weights."""
    formats = scheme(quantization, DTYPE)
    shapes = shapes_of(spec)
    blocks = sum(
        device_bytes(formats.linear, matrix.num_rows, matrix.num_columns)
        for matrix in shapes.matrices
        if matrix.role == "linear"
    )
    head = device_bytes(formats.table, spec.vocab_size, spec.hidden_size)
    return blocks + head + shapes.num_vector_parameters * ITEM_BYTES[DTYPE]


def decode_bytes(
    spec: ModelSpec,
    *,
    batch: int,
    context: float,
    quantization: str = NONE,
    kv_dtype: str = DTYPE,
) -> float:
    """Bytes that one decode step must read from device memory.

    Args:
        batch: requests, each with `context` tokens in the KV cache.
    """
    kv_bytes = batch * context * spec.kv_bytes_per_token(kv_dtype)
    return weight_bytes(spec, quantization) + kv_bytes


def decode_flops(spec: ModelSpec, *, batch: int, context: float) -> float:
    """Operations of one decode step; a multiplication and an addition are two."""
    linear = 2.0 * (block_parameters(spec) + head_parameters(spec))
    return batch * (linear + _attention_flops(spec, context))


def prefill_flops(spec: ModelSpec, num_tokens: int) -> float:
    """Operations of one prompt of which nothing is known and one token is sampled."""
    linear = 2.0 * (block_parameters(spec) * num_tokens + head_parameters(spec))
    seen = num_tokens * (num_tokens + 1) / 2  # pairs of a query and a key it may see
    return linear + _attention_flops(spec, seen)


def _attention_flops(spec: ModelSpec, num_pairs: float) -> float:
    """Scores and weighted values of `num_pairs` pairs of a query and a key, in all layers."""
    return 4.0 * spec.num_layers * spec.num_heads * spec.head_dim * num_pairs

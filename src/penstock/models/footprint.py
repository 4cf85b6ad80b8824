"""What a model takes in memory on a backend, from its spec alone: nothing is loaded for it.

Owns the arithmetic of weights and activations. Knows neither how much memory there is nor the
engine's own (KV pool, logits, the state of requests). Imports no torch.
Invariant: the workspace is an upper estimate (`tests/models/test_footprint.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.attention import PIECE_LEN
from penstock.models.spec import ITEM_BYTES, ModelSpec
from penstock.quantization import schemes

MIB = 2**20
TORCH_BYTES = 400 * MIB  # Python, torch and its libraries, measured
NATIVE_BYTES = 100 * MIB  # Python, numpy and the kernels, measured
_THREAD_BYTES = 4 * MIB  # scratch of the kernels, for each thread


class Footprint(NamedTuple):
    """Bytes, and for people where they come from."""

    weight_bytes: int
    weights: str
    workspace_bytes: int  # of the largest step, without logits
    runtime_bytes: int
    runtime: str


class Step(NamedTuple):
    """The largest step."""

    num_tokens: int
    context_len: int


def on_torch(spec: ModelSpec, dtype: str, step: Step) -> Footprint:
    """Of the torch backend, which keeps a second, packed copy of a tied table."""
    item_bytes = ITEM_BYTES[dtype]
    num_copied = spec.vocab_size * spec.hidden_size if spec.tied_embeddings else 0
    copied = f" + {num_copied:,} packed for the head" if num_copied else ""
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    widths = 3 * spec.hidden_size + 2 * qkv + 3 * spec.intermediate_size
    # The longest row's keys and values gathered in one place, a mask and the scores of a piece.
    gathered = 2 * spec.num_kv_heads * spec.head_dim + (1 + spec.num_heads) * PIECE_LEN
    numbers = step.num_tokens * widths + step.context_len * gathered * 3 // 2
    return Footprint(
        (spec.num_parameters + num_copied) * item_bytes,
        f"{spec.num_parameters:,} parameters{copied} x {item_bytes} bytes ({dtype})",
        numbers * item_bytes,
        TORCH_BYTES,
        "Python and torch",
    )


def on_native(
    spec: ModelSpec, dtype: str, quantization: str, step: Step, num_threads: int
) -> Footprint:
    """Of the native backend, which packs every matrix once."""
    item_bytes = ITEM_BYTES[dtype]
    scheme = schemes.scheme(quantization, dtype)
    block = sum(schemes.packed_bytes(scheme.linear, *shape) for shape in spec.block_matrices)
    table = schemes.packed_bytes(scheme.table, spec.vocab_size, spec.hidden_size)
    num_tables = 1 if spec.tied_embeddings else 2
    weight_bytes = spec.num_layers * block + num_tables * table + 4 * spec.num_vector_parameters
    form = dtype if quantization == schemes.NONE else quantization
    # What lives at the same time at most: the residual stream (float32), the input and the output
    # of a map, and its input once more as the kernels read it; the angles of the positions.
    widest = max(rows + 2 * columns for rows, columns in spec.block_matrices)
    numbers = 4 * (spec.hidden_size + spec.head_dim) + item_bytes * (spec.hidden_size + widest)
    return Footprint(
        weight_bytes,
        f"{spec.num_parameters:,} parameters in {form}, packed",
        step.num_tokens * numbers + num_threads * _THREAD_BYTES,
        NATIVE_BYTES,
        "Python and the kernels",
    )

"""What a model takes in memory on a backend, from its spec alone: nothing is loaded for it.

Owns the arithmetic of weights and activations. Knows neither how much memory there is nor the
engine's own (KV pool, logits, the state of requests). Imports no torch.
Invariant: the workspace is an upper estimate (`tests/models/test_footprint.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.attention import PIECE_LEN
from penstock.hardware import num_usable_cores
from penstock.models.spec import ITEM_BYTES, ModelSpec
from penstock.quantization import schemes

MIB = 2**20
TORCH_BYTES = 400 * MIB  # Python, torch and its libraries, measured
NATIVE_BYTES = 100 * MIB  # Python, numpy and the kernels, measured
_THREAD_BYTES = 4 * MIB  # scratch of the kernels, for each thread, without what follows
_MAX_SPLITS = 104  # of a context into tasks of attention: enough for 2**24 tokens
_ROW_BYTES = 128  # beside the numbers of a row, or of a token, that the kernels prepare


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
    spec: ModelSpec, dtype: str, quantization: str, step: Step, num_threads: int | None
) -> Footprint:
    """Of the native backend, which packs every matrix once; by default on all usable cores."""
    item_bytes = ITEM_BYTES[dtype]
    scheme = schemes.scheme(quantization, dtype)
    block = sum(schemes.packed_bytes(scheme.linear, *shape) for shape in spec.block_matrices)
    table = schemes.packed_bytes(scheme.table, spec.vocab_size, spec.hidden_size)
    num_tables = 1 if spec.tied_embeddings else 2
    weight_bytes = spec.num_layers * block + num_tables * table + 4 * spec.num_vector_parameters
    form = dtype if quantization == schemes.NONE else quantization
    numbers = 4 * (spec.hidden_size + spec.head_dim) + item_bytes * _most_numbers(spec)
    # What the kernels multiply with: the widest input of a map, once more, padded.
    input_bytes = item_bytes if quantization == schemes.NONE else scheme.activation_bits // 8
    widest = max(columns for _, columns in spec.block_matrices)
    row_bytes = input_bytes * widest + 2 * _ROW_BYTES
    return Footprint(
        weight_bytes,
        f"{spec.num_parameters:,} parameters in {form}, packed",
        step.num_tokens * (numbers + row_bytes)
        + (num_threads or num_usable_cores()) * thread_bytes(spec),
        NATIVE_BYTES,
        "Python and the kernels",
    )


def thread_bytes(spec: ModelSpec) -> int:
    """Of the native kernels, for each thread of the pool, whatever the step: an upper bound."""
    converted = 64 * max(columns for _, columns in spec.block_matrices)  # two panels in bfloat16
    group = spec.num_heads // spec.num_kv_heads
    vector_bytes = 4 * spec.head_dim + _ROW_BYTES  # an unfinished sum of values
    return _THREAD_BYTES + converted + 4 * _MAX_SPLITS * max(group, 16) * vector_bytes


def _most_numbers(spec: ModelSpec) -> int:
    """Of a token, in values that live at the same time, beside residual stream and angles.

    The widest value, with it the widest one that is the narrower of an op's input and output, and
    the width of a norm's output, for gaps between their places.
    """
    hidden, q_size = spec.hidden_size, spec.num_heads * spec.head_dim
    qkv = spec.block_matrices[0][0]
    pairs = [*spec.block_matrices, (qkv, q_size), (hidden, hidden)]  # maps, attention, norm
    return max(map(max, pairs)) + max(map(min, pairs)) + hidden

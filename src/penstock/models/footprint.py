"""What a model takes in memory on a backend, from its spec alone: nothing is loaded for it.

Owns the arithmetic of weights and activations. Knows neither how much memory there is nor the
engine's own (KV pool, logits, the state of requests). Imports no torch.
Invariant: the workspace is an upper estimate (`tests/models/test_footprint.py`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from penstock.attention import PIECE_LEN
from penstock.hardware import num_usable_cores
from penstock.layers.specs import AttentionSpec, ExpertsSpec, LatentSpec, MLPSpec
from penstock.models.shapes import MatrixShape, shapes_of
from penstock.models.spec import ITEM_BYTES, LayerSpec, ModelSpec
from penstock.quantization import schemes
from penstock.quantization.placing import Formats
from penstock.quantization.stored import StoredPrecision

MIB = 2**20
TORCH_BYTES = 400 * MIB  # Python, torch and its libraries, measured
NATIVE_BYTES = 100 * MIB  # Python, numpy and the kernels, measured
_THREAD_BYTES = 4 * MIB  # scratch of the kernels, for each thread, without what follows
_MAX_SPLITS = 104  # of a context into tasks of attention: enough for 2**24 tokens
_PADDING = 64  # columns, at most, that a row is filled up with
_TASK_OUTPUTS = 128  # of a thread's task in a mixture of experts
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


def on_torch(
    spec: ModelSpec, dtype: str, step: Step, stored: StoredPrecision | None = None
) -> Footprint:
    """Of the torch backend, which keeps a second, packed copy of a tied table.

    What a checkpoint has in codes becomes numbers of `dtype` there.
    """
    item_bytes = ITEM_BYTES[dtype]
    num_parameters = shapes_of(spec).num_parameters
    num_copied = spec.vocab_size * spec.hidden_size if spec.tied_embeddings else 0
    copied = f" + {num_copied:,} packed for the head" if num_copied else ""
    inflated = "" if stored is None else f", out of {stored.name}"
    widths = 3 * spec.hidden_size + max(map(_torch_widths, set(spec.layers)))
    # The longest row's keys and values gathered in one place, a mask and the scores of a piece.
    num_vectors, size = spec.cached
    gathered = num_vectors * size + (1 + spec.num_heads) * PIECE_LEN
    numbers = step.num_tokens * widths + step.context_len * gathered * 3 // 2
    return Footprint(
        (num_parameters + num_copied) * item_bytes,
        f"{num_parameters:,} parameters{copied} x {item_bytes} bytes ({dtype}{inflated})",
        numbers * item_bytes,
        TORCH_BYTES,
        "Python and torch",
    )


def on_native(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    step: Step,
    num_threads: int | None,
    stored: StoredPrecision | None = None,
) -> Footprint:
    """Of the native backend, which packs every matrix once; by default on all usable cores."""
    item_bytes = ITEM_BYTES[dtype]
    formats = Formats(schemes.scheme(quantization, dtype), stored)
    form = dtype if quantization == schemes.NONE else quantization
    num_threads = num_threads or num_usable_cores()
    numbers = 4 * (spec.hidden_size + spec.head_dim) + max(
        _native_bytes(spec, layer, item_bytes) for layer in set(spec.layers)
    )
    scratch = _scratch_bytes(spec, formats, item_bytes, num_threads)
    return Footprint(
        weight_bytes(spec, formats),
        f"{spec.num_parameters:,} parameters in {form if stored is None else stored.name}, packed",
        step.num_tokens * (numbers + scratch) + num_threads * thread_bytes(spec),
        NATIVE_BYTES,
        "Python and the kernels",
    )


@lru_cache(maxsize=64)
def weight_bytes(spec: ModelSpec, formats: Formats) -> int:
    """Of a model's weights as the native library packs them; vectors are float32."""
    shapes = shapes_of(spec)
    matrices = sum(matrix_bytes(shape, formats) for shape in shapes.matrices)
    latent = sum(
        _latent_bytes(layer.attention, formats)
        for layer in spec.layers
        if isinstance(layer.attention, LatentSpec)
    )
    # Positions are held once for each type of token, with its vector added.
    num_copied = max(spec.num_token_types - 1, 0) * spec.num_positions
    num_types = spec.num_token_types if spec.num_positions else 0
    tables = (num_copied - num_types) * spec.hidden_size
    return matrices + latent + 4 * (shapes.num_vector_parameters + tables)


def _latent_bytes(spec: LatentSpec, formats: Formats) -> int:
    """Of both maps of latent attention, from queries to latents and from these to values.

    Each head's rows are panels of their own; the first is transposed and so has no stored codes.
    """
    form = formats.scheme.linear
    return sum(
        spec.num_heads * schemes.packed_bytes(form, num_rows, num_columns)
        for num_rows, num_columns in ((spec.rank, spec.nope_dim), (spec.value_dim, spec.rank))
    )


def matrix_bytes(shape: MatrixShape, formats: Formats) -> int:
    """Of one matrix; gate and up are cut into panels of their own; "latent" is counted apart."""
    return sum(
        schemes.packed_bytes(form, num_rows, shape.num_columns)
        for form, num_rows in pieces_of(shape, formats)
    )


def pieces_of(shape: MatrixShape, formats: Formats) -> list[tuple[schemes.Format, int]]:
    """The formats in which the rows of one matrix are held, each with its rows."""
    columns = shape.num_columns
    match shape.role:
        case "latent":
            return []
        case "table" | "head":
            form = formats.table(shape.parts[0], shape.num_rows, columns)
            return [(form, shape.num_rows)]
        case "router":
            return [(schemes.Format("float32"), shape.num_rows)]
    parts = list(zip(shape.parts, shape.part_rows, strict=True))
    if shape.is_gated:
        (piece,) = formats.linear(parts, columns, is_gated=True)
        return [(piece.form, shape.part_rows[0])] * 2
    pieces = formats.linear(parts, columns, is_gated=False)
    return [(piece.form, piece.num_rows) for piece in pieces]


def thread_bytes(spec: ModelSpec) -> int:
    """Of the native kernels, for each thread of the pool, whatever the step: an upper bound."""
    widest = max(shape.num_columns for shape in shapes_of(spec).matrices)
    converted = 128 * widest  # two panels in float32
    group = spec.num_heads // spec.num_kv_heads
    vector_bytes = 4 * spec.head_dim + _ROW_BYTES  # an unfinished sum of values
    return _THREAD_BYTES + converted + 4 * _MAX_SPLITS * max(group, 16) * vector_bytes


def _torch_widths(layer: LayerSpec) -> int:
    """Numbers of a token that torch holds in a block at the same time, without the stream."""
    attention, mlp = layer.attention, layer.mlp
    if isinstance(attention, AttentionSpec):
        widths = 2 * (attention.q_size + 2 * attention.kv_size)
    else:
        widths = 3 * attention.num_heads * (attention.rank + attention.key_dim)
    if isinstance(mlp, MLPSpec):
        return widths + 3 * mlp.size
    return widths + 4 * mlp.num_experts + mlp.top_k * 5 * mlp.size + 3 * mlp.shared_size


def _native_bytes(spec: ModelSpec, layer: LayerSpec, item_bytes: int) -> int:
    """Of a token, in values that live at the same time, beside residual stream and angles.

    The widest value, with it the widest one that is the narrower of an op's input and output, and
    the width of a norm's output, for gaps between their places.
    """
    hidden, attention, mlp = spec.hidden_size, layer.attention, layer.mlp
    pairs = [(hidden, hidden)]
    more = hidden if spec.arrangement in {"parallel", "sandwich"} else 0
    if isinstance(attention, AttentionSpec):
        qkv = attention.q_size + 2 * attention.kv_size
        pairs += [(hidden, qkv), (qkv, attention.q_size), (attention.q_size, hidden)]
    else:
        pairs += _latent_pairs(hidden, attention)
    logits_bytes = 0
    if isinstance(mlp, MLPSpec):
        pairs += [(hidden, mlp.size), (mlp.size, hidden)]
    else:
        pairs.append((hidden, max(mlp.shared_size, 1)))
        more += hidden + mlp.shared_size
        logits_bytes = 4 * mlp.num_experts
    numbers = max(map(max, pairs)) + max(map(min, pairs)) + hidden + more
    if spec.arrangement == "encoder":
        numbers += 4 // item_bytes * 2 * hidden  # a stream is made anew
    return item_bytes * numbers + logits_bytes


def _latent_pairs(hidden: int, spec: LatentSpec) -> list[tuple[int, int]]:
    """Inputs and outputs of latent attention: queries, latents and both absorbed live together."""
    queries, latent = spec.num_heads * spec.key_dim, spec.rank + spec.rope.dim
    absorbed = spec.num_heads * latent
    return [
        (hidden + spec.query_rank, queries),
        (queries + latent, absorbed),
        (absorbed, spec.num_heads * spec.rank),
        (spec.num_heads * spec.rank, spec.num_heads * spec.value_dim),
    ]


def _scratch_bytes(spec: ModelSpec, formats: Formats, item_bytes: int, num_threads: int) -> int:
    """Of a token, in the ops' own memory, which they take in turns."""
    is_integer = formats.scheme.linear.dtype in {"int8", "int4"} or (
        formats.stored is not None and formats.stored.activation_bits == 8
    )
    is_coded = is_integer or formats.stored is not None
    # What the kernels multiply with: the widest input of a map, once more, padded.
    input_bytes = max(item_bytes, formats.activation_bits // 8) if is_coded else item_bytes
    widest = max(shape.num_columns for shape in shapes_of(spec).matrices)
    found = [input_bytes * widest + 2 * _ROW_BYTES]
    for layer in set(spec.layers):
        attention, mlp = layer.attention, layer.mlp
        if isinstance(attention, LatentSpec):  # the inputs of all heads
            found.append(input_bytes * attention.num_heads * (attention.rank + _PADDING))
        if isinstance(mlp, ExpertsSpec):
            middle_bytes = item_bytes + is_integer * formats.activation_bits // 8
            found.append(_experts_bytes(mlp, middle_bytes, num_threads))
    return max(found)


def _experts_bytes(spec: ExpertsSpec, middle_bytes: int, num_threads: int) -> int:
    """Scratch of the experts' op for a token.

    The middle of each expert that it takes, as it is written and as it is read; and of every thread
    the order of all tokens by expert, and a task's sums.
    """
    chosen = spec.top_k * (middle_bytes * (spec.size + _PADDING) + _ROW_BYTES)
    return chosen + num_threads * (8 * spec.top_k + 4 * _TASK_OUTPUTS)

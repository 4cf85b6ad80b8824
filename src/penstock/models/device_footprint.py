"""What a model takes in the memory of a GPU, for one rank, from its spec alone.

Owns the arithmetic of a rank's weights, of the activations of a step, of the tables by row, and of
what CUDA itself takes. Does not know the KV pool. Imports no torch.
Invariant: weights are exact for the first rank, which no other exceeds, and activations an upper
estimate (`tests/models/test_device_footprint.py`). What only a GPU can tell is a constant here.
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.layers.specs import Activation, AttentionSpec, MLPSpec, NormSpec
from penstock.models.device_shapes import Share
from penstock.models.device_weights import weight_bytes
from penstock.models.footprint import MIB, TORCH_BYTES, Footprint
from penstock.models.spec import ITEM_BYTES, LayerSpec, ModelSpec
from penstock.quantization import schemes
from penstock.quantization.stored import StoredPrecision

# Estimates, until `tests/gpu` has measured them.
LIBRARY_BYTES = 320 * MIB  # cuBLAS and its workspaces, our kernels, the allocator's last segments
GROUP_BYTES = 256 * MIB  # NCCL's buffers, with several ranks
GRAPH_BYTES = 4 * MIB  # a captured graph, beside what it computes in
MAX_GRAPH_ROWS = 512  # as vLLM by default: a step of more keeps a GPU busy while it is launched
FLASHINFER_BYTES = 128 * MIB  # `penstock.attention.flashinfer.WORKSPACE_BYTES`
FLASHINFER_WRAPPER_BYTES = 8 * MIB  # what each allocates for its plans
SPLIT_K_BYTES = 32 * MIB  # partial sums: of programs that share a matrix's columns, or a prompt
MAX_PROGRAMS = 16 * 160  # that share contexts: 16 a multiprocessor of the largest GPUs
_ALIGNMENT = 4  # int32 numbers: of `penstock.kernels.transfer`
_INPUT_BYTES = 40  # of a token: itself, position, slot, its place among tiles and in a rank's table
_UNPACKED_BYTES = {"int8": 15, "int4": 10}  # a number of a row of a table, on its way out of it
_MORE_INPUT_BYTES = 16  # of a token: its place among learned positions, what LayerNorm gives beside
_SETTINGS_BYTES = 64  # of sampling, by row
# Tensors as wide as an MLP's middle that live at the same time in an activation, if not one.
_ACTIVE: dict[Activation, int] = {"relu_squared": 2, "swiglu_oai": 6}


class DeviceStep(NamedTuple):
    """The largest step, and the largest that is replayed."""

    num_tokens: int
    num_rows: int = 0  # of the largest graph
    num_graphs: int = 0  # sizes that are captured


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows for which decode is captured, ascending; a step takes the next one up.

    Close together where a step is short, so that padding costs little anywhere. Steps of more rows
    than the last one are computed eagerly.
    """
    most = min(max_num_seqs, MAX_GRAPH_ROWS)
    sizes, size = {1, 2, 4, most}, 8
    while size < most:
        sizes.add(size)
        size += 8 if size < 64 else 16 if size < 256 else 32
    return sorted(size for size in sizes if size <= most)


def table_bytes(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Of token ids and blocks by row, a dummy row included, and the numbers of a step."""
    num_rows = max_num_seqs + 1
    num_blocks = -(-max_model_len // block_size)
    numbers = _aligned(num_rows * max_model_len) + _aligned(num_rows * num_blocks)
    return 4 * (numbers + 8 * (max_num_seqs + _ALIGNMENT)) + num_rows * _SETTINGS_BYTES


def share_of(model: ModelSpec, group_size: int) -> Share:
    """What the first of `group_size` ranks has of a model."""
    return Share(model, group_size)


def on_device(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    step: DeviceStep,
    group_size: int = 1,
    *,
    is_on_gpu: bool = True,
    stored: StoredPrecision | None = None,
) -> Footprint:
    """Of the triton backend, on each of `group_size` ranks; without a GPU, of what tries it out.

    What a checkpoint has in codes (`stored`) becomes numbers of `dtype` there.
    """
    share = share_of(spec, group_size)
    form = dtype if quantization == schemes.NONE else quantization
    if stored is not None:
        form = f"{stored.name}, held in {dtype}"
    ranks = ", its share of them" if group_size > 1 else ""
    runtime_bytes, runtime = TORCH_BYTES, "Python and torch"
    if is_on_gpu:
        runtime_bytes, runtime = LIBRARY_BYTES, "the CUDA libraries"
        if group_size > 1:
            runtime_bytes += GROUP_BYTES
        if step.num_graphs:  # their pool: what the largest of them computes in
            runtime_bytes += step.num_graphs * GRAPH_BYTES
            replayed = activation_bytes(share, dtype, quantization, step.num_rows)
            runtime_bytes += replayed + scratch_bytes(share)
            runtime += f" and {step.num_graphs} CUDA graphs"
    return Footprint(
        weight_bytes(share, dtype, quantization),
        f"{spec.num_parameters:,} parameters in {form}{ranks}",
        activation_bytes(share, dtype, quantization, step.num_tokens) + scratch_bytes(share),
        runtime_bytes,
        runtime,
    )


def activation_bytes(share: Share, dtype: str, quantization: str, num_tokens: int) -> int:
    """Of the tensors that live at the same time in a step, at its widest place; without scratch.

    Beside the residual stream, what the block before gave is alive until the block ends, and so is
    what attention gave until the MLP ends.
    """
    scheme = schemes.scheme(quantization, dtype)
    hidden, item_bytes = share.spec.hidden_size, ITEM_BYTES[dtype]
    widest = max(_block_bytes(share, layer, scheme, item_bytes) for layer in set(share.spec.layers))
    embedding = item_bytes * 2 * hidden  # a rank's share and all of it, or that of a position
    if (unpacked := _UNPACKED_BYTES.get(scheme.table.dtype)) is not None:
        columns = schemes.DEVICE_COLUMNS
        embedding = -(-hidden // columns) * columns * unpacked
        embedding = max(embedding, item_bytes * 2 * hidden)
    is_plain = share.spec.norm == NormSpec(eps=share.spec.norm.eps) and not share.spec.num_positions
    more = 0 if is_plain else _MORE_INPUT_BYTES
    return num_tokens * (max(widest, embedding) + _INPUT_BYTES + more)


def _block_bytes(share: Share, layer: LayerSpec, scheme: schemes.Scheme, item_bytes: int) -> int:
    """Of a token, in a block."""
    spec = share.spec
    hidden = item_bytes * spec.hidden_size
    attending = _attention_bytes(share, layer, scheme, item_bytes)
    within = _mlp_bytes(share, layer, scheme, item_bytes)
    normed = 0
    if spec.norm.offset and spec.norm.kind == "layer":  # in float32, in and out
        normed = (4 if spec.names.after_mlp else 3) * hidden + 2 * 4 * spec.hidden_size + hidden
    beside = 1 if spec.arrangement == "parallel" else 0  # the input of the other one
    return max((3 + beside) * hidden + attending, (4 + beside) * hidden + within, normed)


def _attention_bytes(
    share: Share, layer: LayerSpec, scheme: schemes.Scheme, item_bytes: int
) -> int:
    """Of a token, within attention."""
    spec, attention = share.spec, layer.attention
    assert isinstance(attention, AttentionSpec)
    num_turned = share.num_heads + share.num_kv_heads
    q_size = share.num_heads * share.head_dim
    q_bytes = item_bytes * q_size
    qkv = item_bytes * (num_turned + share.num_kv_heads) * share.head_dim
    widths = [
        _rounded(scheme, spec.hidden_size) + qkv,
        qkv + q_bytes,
        _rounded(scheme, q_size) + q_bytes + item_bytes * spec.hidden_size,
    ]
    if attention.qk_norm is not None:
        by_kernel = attention.qk_norm.kind == "rms" and attention.qk_norm_over != "heads"
        widths.append(qkv + (2 * item_bytes if by_kernel else 3 * 4) * q_size + 8 * num_turned)
    rope = attention.rope
    if rope is not None and (rope.dim != share.head_dim or rope.factor != 1.0):
        widths.append(qkv + 3 * 4 * num_turned * rope.dim + 8 * rope.dim + 4)
    return max(widths)


def _mlp_bytes(share: Share, layer: LayerSpec, scheme: schemes.Scheme, item_bytes: int) -> int:
    """Of a token, within the MLP."""
    hidden, mlp = share.spec.hidden_size, layer.mlp
    assert isinstance(mlp, MLPSpec)
    size = mlp.size // share.group_size
    middle = item_bytes * size
    first = (2 if mlp.is_gated else 1) * middle
    return max(
        _rounded(scheme, hidden) + first,
        first + _ACTIVE.get(mlp.activation, 1) * middle,
        _rounded(scheme, size) + middle + item_bytes * hidden,
    )


def _rounded(scheme: schemes.Scheme, size: int) -> int:
    """The input of a map in 8 bits, with its scales, beside the input itself."""
    group_size = scheme.linear.group_size or size
    return size + 4 * -(-size // group_size) if scheme.activation_bits == 8 else 0


def scratch_bytes(share: Share) -> int:
    """Of partial sums. Work is divided until it fills a GPU, so that this knows no step."""
    group = share.num_heads // share.num_kv_heads
    return SPLIT_K_BYTES + MAX_PROGRAMS * group * 4 * (share.head_dim + 1)


def flashinfer_bytes(max_num_seqs: int, *, is_eager: bool) -> int:
    """Of its workspace, and of each of its wrappers: for prompts, for decode, for each graph."""
    num_wrappers = 2 + (0 if is_eager else len(graph_sizes(max_num_seqs)))
    return FLASHINFER_BYTES + num_wrappers * FLASHINFER_WRAPPER_BYTES


def _aligned(num_numbers: int) -> int:
    return num_numbers + -num_numbers % _ALIGNMENT

"""What a model takes in the memory of a GPU, for one rank, from its spec alone.

Owns the arithmetic of a rank's weights, of the activations of a step, of the tables by row, and of
what CUDA itself takes. Does not know the KV pool. Imports no torch.
Invariant: weights are exact for the first rank, which no other exceeds, and activations an upper
estimate (`tests/models/test_device_footprint.py`). What only a GPU can tell is a constant here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from penstock.layers import shards
from penstock.models.footprint import MIB, TORCH_BYTES, Footprint
from penstock.models.spec import ITEM_BYTES, ModelSpec
from penstock.quantization import schemes

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
_SETTINGS_BYTES = 64  # of sampling, by row


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


def share_of(spec: ModelSpec, group_size: int) -> ModelSpec:
    """What one of `group_size` ranks has of a model, as if it were a model."""
    if group_size == 1:
        return spec
    heads = shards.heads(spec.num_heads, spec.num_kv_heads, group_size)
    return replace(
        spec,
        vocab_size=shards.vocabulary(spec.vocab_size, group_size, 0).num_rows,
        intermediate_size=spec.intermediate_size // group_size,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
    )


def on_device(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    step: DeviceStep,
    group_size: int = 1,
    *,
    is_on_gpu: bool = True,
) -> Footprint:
    """Of the triton backend, on each of `group_size` ranks; without a GPU, of what tries it out."""
    share = share_of(spec, group_size)
    form = dtype if quantization == schemes.NONE else quantization
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


def weight_bytes(share: ModelSpec, dtype: str, quantization: str) -> int:
    """Of the matrices as `quantization.device` holds them, norms, biases and frequencies."""
    scheme = schemes.scheme(quantization, dtype)
    qkv, output, gate, up, down = share.block_matrices
    joined = (gate[0] + up[0], gate[1])
    block = sum(
        schemes.device_bytes(scheme.linear, *shape) for shape in (qkv, output, joined, down)
    )
    table = schemes.device_bytes(scheme.table, share.vocab_size, share.hidden_size)
    num_tables = 1 if share.tied_embeddings else 2
    vectors = ITEM_BYTES[dtype] * share.num_vector_parameters + 4 * (share.head_dim // 2)
    return share.num_layers * block + num_tables * table + vectors


def activation_bytes(share: ModelSpec, dtype: str, quantization: str, num_tokens: int) -> int:
    """Of the tensors that live at the same time in a step, at its widest place; without scratch.

    Beside the residual stream, what the block before gave is alive until the block ends, and so is
    what attention gave until the MLP ends.
    """
    scheme = schemes.scheme(quantization, dtype)
    hidden, q_size = share.hidden_size, share.num_heads * share.head_dim
    qkv, middle = share.block_matrices[0][0], share.intermediate_size

    def values(*sizes: int) -> int:
        return ITEM_BYTES[dtype] * sum(sizes)

    def rounded(size: int) -> int:
        """The input of a map in 8 bits, with its scales, beside the input itself."""
        group_size = scheme.linear.group_size or size
        return size + 4 * -(-size // group_size) if scheme.activation_bits == 8 else 0

    attention = values(*[hidden] * 3) + max(
        rounded(hidden) + values(qkv),
        values(qkv, q_size),
        rounded(q_size) + values(q_size, hidden),
    )
    mlp = values(*[hidden] * 4) + max(
        rounded(hidden) + values(2 * middle),
        values(2 * middle, middle),
        rounded(middle) + values(middle, hidden),
    )
    embedding = values(2 * hidden)  # a rank's share, and all of it
    if (unpacked := _UNPACKED_BYTES.get(scheme.table.dtype)) is not None:
        columns = schemes.DEVICE_COLUMNS
        embedding = -(-hidden // columns) * columns * unpacked
    return num_tokens * (max(attention, mlp, embedding) + _INPUT_BYTES)


def scratch_bytes(share: ModelSpec) -> int:
    """Of partial sums. Work is divided until it fills a GPU, so that this knows no step."""
    group = share.num_heads // share.num_kv_heads
    return SPLIT_K_BYTES + MAX_PROGRAMS * group * 4 * (share.head_dim + 1)


def flashinfer_bytes(max_num_seqs: int, *, is_eager: bool) -> int:
    """Of its workspace, and of each of its wrappers: for prompts, for decode, for each graph."""
    num_wrappers = 2 + (0 if is_eager else len(graph_sizes(max_num_seqs)))
    return FLASHINFER_BYTES + num_wrappers * FLASHINFER_WRAPPER_BYTES


def _aligned(num_numbers: int) -> int:
    return num_numbers + -num_numbers % _ALIGNMENT

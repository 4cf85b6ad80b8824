"""How fast the kernels are here, measured: products, attention, what lies between them, sampling.

Owns what is run for it and the medians. Knows shapes and formats, and no models; `models.estimate`
makes speeds of them. Numbers do not change how long anything takes, so none are drawn.
Invariant: what is read at a time when weights come from memory is more than the caches hold, unless
the caller's matrices are less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Part, Program
from penstock.native.sampling import Sampler
from penstock.native.structs import (
    Activation,
    AttentionArgs,
    Epilogue,
    LinearArgs,
    NormArgs,
    NormKind,
    OpKind,
    Rows,
)
from penstock.native.weights import Form, PackedWeight, padded_rows

STREAM_BYTES = 256 * 2**20  # of matrices that are read in turn: more than caches hold
FEW_ROWS = 32  # up to these products wait for memory, and all matrices are read
BLOCK_BYTES = 24 * 2**20  # of matrices that are enough for more rows
BLOCK_SIZE = 16  # tokens of a KV block
KV_BYTES = 96 * 2**20  # of the KV memory that is read in turn
FILLER = 60  # each byte: a small number in every format
_NUM_OPS = 24  # of a kind, where one is too short to be timed
_LEAST_S = 0.1  # a measurement takes, with at least
_ROUNDS = 3


class Curve(NamedTuple):
    """Seconds of one unit of work, by the rows that are computed at once."""

    rows: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]

    def at(self, rows: float) -> float:
        """Between what was measured on a line, before it as the first, behind it by proportion."""
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.seconds))


class Product(NamedTuple):
    """The shape of a linear map: gate and up of a gated one are `num_rows` each."""

    num_rows: int
    num_columns: int
    is_gated: bool = False

    @property
    def num_parameters(self) -> int:
        """Numbers in its matrices."""
        return self.num_rows * self.num_columns * (1 + self.is_gated)


class Geometry(NamedTuple):
    """Attention over one layer of a KV store."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # of what queries are compared with
    value_dim: int
    is_latent: bool = False

    @property
    def num_vectors(self) -> int:
        """That the store keeps of a token."""
        return 1 if self.is_latent else 2 * self.num_kv_heads


class _Step(NamedTuple):
    """Implements `native.program.StepArrays`."""

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    block_table: NDArray[np.int32]
    block_size: int


def products(
    pool: Pool,
    form: Form,
    shapes: Sequence[Product],
    rows: Sequence[int],
    *,
    dtype: str,
    activation_bits: int,
) -> Curve:
    """Seconds a number of matrices of these shapes, in this format, by rows that meet it.

    Args:
        shapes: in the order in which a model has them; the first ones are taken, in turns.
        dtype: of activations: float32 or bfloat16.
        activation_bits: that int8 and int4 matrices are multiplied with: 8 or 16.
    """
    program, arena = Program(pool, max(rows), 1), Arena()
    packed: list[PackedWeight] = []
    for shape in shapes:
        count = 2 * padded_rows(shape.num_rows) if shape.is_gated else shape.num_rows
        packed.append(PackedWeight(pool, form, count, shape.num_columns, arena))
        if arena.num_bytes >= STREAM_BYTES:
            break
    arena.memory.fill(FILLER)
    bits = activation_bits if form.dtype in {"int8", "int4"} else 16
    inputs: dict[int, Buffer] = {}
    block: tuple[Part, int] | None = None  # what is enough for many rows, and its numbers
    num_parameters = num_bytes = 0
    for shape, weight in zip(shapes, packed, strict=False):
        x = inputs.setdefault(shape.num_columns, program.value(shape.num_columns, dtype))
        _append_product(program, weight, shape, x, program.value(shape.num_rows, dtype), bits)
        num_bytes += weight.data.nbytes
        num_parameters += shape.num_parameters
        if num_bytes >= BLOCK_BYTES and block is None:
            block = program.end_part(), num_parameters
    if block is None:
        block = program.end_part(), num_parameters
    elif block[0].num_ops < len(packed):
        program.end_part()
    program.finish()
    whole = Part(0, len(packed)), num_parameters
    seconds = []
    for count in rows:
        part, size = whole if count <= FEW_ROWS else block
        seconds.append(_replay(program, part, _tokens(count)) / size)
    return Curve(tuple(rows), tuple(seconds))


def _append_product(
    program: Program, weight: PackedWeight, shape: Product, x: Buffer, y: Buffer, bits: int
) -> None:
    args = LinearArgs(
        weight=weight.struct,
        x_stride=x.width,
        y_stride=y.width,
        num_groups=1,
        x_dtype=x.dtype_id,
        y_dtype=y.dtype_id,
        rows=Rows.TOKENS,
        epilogue=Epilogue.GATED if shape.is_gated else Epilogue.STORE,
        activation=Activation.SILU if shape.is_gated else Activation.IDENTITY,
        activation_bits=bits,
        num_outputs=shape.num_rows,
        y_scale=1.0,
    )
    program.append(OpKind.LINEAR, args, x=x, y=y)


def attention(
    pool: Pool,
    geometry: Geometry,
    *,
    dtype: str,
    kv_dtype: str,
    context_len: int,
    num_layers: int,
    num_requests: int,
    num_new: int = 1,
) -> float:
    """Seconds of one layer's attention of `num_requests`, each with `num_new` tokens to compute.

    They are the last of `context_len` tokens. As many layers as exceed the caches are taken in
    turns, at most `num_layers`, the model's own.
    """
    num_blocks = -(-context_len // BLOCK_SIZE)
    num_slots = num_requests * num_blocks * BLOCK_SIZE
    store = geometry.num_vectors, geometry.head_dim, kv_dtype
    one = KVMemory(1, num_slots, *store)
    layer_bytes = one.data.nbytes + one.scales.nbytes
    count = max(min(num_layers, -(-KV_BYTES // layer_bytes)), 1) if num_new == 1 else 1
    kv = KVMemory(count, num_slots, *store)
    kv.data.fill(FILLER)
    kv.scales.fill(FILLER)
    program = Program(pool, num_requests * num_new, 1)
    for layer in range(count):
        _append_attention(program, geometry, kv, layer, dtype)
    part = program.end_part()
    program.finish()
    step = _requests(num_requests, num_new, context_len, num_blocks)
    return _replay(program, part, step) / count


def row_ops(pool: Pool, size: int, rows: Sequence[int], *, dtype: str) -> Curve:
    """Seconds of an op that is no product: a norm of `size` numbers with the sum before it."""
    program, arena = Program(pool, max(rows), 1), Arena()
    place = arena.reserve(4 * size)
    scale = arena.memory[place : place + 4 * size]
    scale.fill(FILLER)
    residual, x = program.value(size, "float32"), program.value(size, dtype)
    for _ in range(_NUM_OPS):
        out = program.value(size, dtype)
        args = NormArgs(
            residual_stride=size,
            x_stride=size,
            weight=scale.ctypes.data,
            out_stride=size,
            size=size,
            eps=1e-5,
            x_scale=1.0,
            kind=NormKind.RMS_NORM,
            dtype=x.dtype_id,
            out_dtype=out.dtype_id,
        )
        program.append(OpKind.NORM, args, residual=residual, x=x, out=out)
    part = program.end_part()
    program.finish()
    program.view(residual).fill(0)
    program.view(x).fill(0)
    seconds = [_replay(program, part, _tokens(count)) / _NUM_OPS for count in rows]
    return Curve(tuple(rows), tuple(seconds))


def sampling(pool: Pool, vocab_size: int, rows: Sequence[int]) -> Curve:
    """Seconds of choosing the most likely token of each row."""
    sampler = Sampler(pool)
    logits = np.zeros((max(rows), vocab_size), np.float32)
    logits[:, :: max(vocab_size // 7, 1)] = 1.0

    def choose(count: int) -> Callable[[], object]:
        zeros = np.zeros(count)
        ints, floats = zeros.astype(np.int32), zeros.astype(np.float32)
        return lambda: sampler(logits[:count], floats, ints, floats + 1, floats, zeros)

    return Curve(tuple(rows), tuple(_seconds(choose(count)) for count in rows))


def _append_attention(
    program: Program, geometry: Geometry, kv: KVMemory, layer: int, dtype: str
) -> None:
    heads, head_dim, value_dim = geometry.num_heads, geometry.head_dim, geometry.value_dim
    width = heads * head_dim
    if not geometry.is_latent:
        width += geometry.num_vectors * head_dim
    qkv, out = program.value(width, dtype), program.value(heads * value_dim, dtype)
    args = AttentionArgs(
        qkv_stride=width,
        out_stride=out.width,
        kv=kv.layer(layer),
        kv_scales=kv.layer_scales(layer),
        num_slots=kv.num_slots,
        dtype=qkv.dtype_id,
        kv_dtype=kv.dtype_id,
        num_heads=heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=head_dim**-0.5,
        is_causal=1,
    )
    values: dict[str, Any] = {"qkv": qkv, "out": out}
    if geometry.is_latent:
        values["latent"] = program.value(head_dim, dtype)
        args.latent_stride = head_dim
    program.append(OpKind.ATTENTION, args, **values)


def _requests(num_requests: int, num_new: int, context_len: int, num_blocks: int) -> _Step:
    """The last `num_new` tokens of each of some requests, whose blocks lie in a row."""
    ids = np.zeros(num_requests * num_new, np.int64)
    positions = np.tile(np.arange(context_len - num_new, context_len), num_requests)
    first_slots = np.repeat(np.arange(num_requests) * num_blocks * BLOCK_SIZE, num_new)
    return _Step(
        ids,
        positions,
        np.arange(0, len(ids) + 1, num_new, dtype=np.int32),
        np.full(num_requests, context_len, np.int32),
        first_slots + positions,
        np.arange(num_requests * num_blocks, dtype=np.int32).reshape(num_requests, num_blocks),
        BLOCK_SIZE,
    )


def _tokens(count: int) -> _Step:
    """One request of that many tokens."""
    return _requests(1, count, count, -(-count // BLOCK_SIZE))


def _replay(program: Program, part: Part, step: _Step) -> float:
    program.set_step(step)
    return _seconds(lambda: program.run(part))


def _seconds(run: Callable[[], object]) -> float:
    """Of one run: the median, after one that warms up."""
    run()
    samples: list[float] = []
    started_s = time.perf_counter()
    while len(samples) < _ROUNDS or time.perf_counter() - started_s < _LEAST_S:
        before_s = time.perf_counter()
        run()
        samples.append(time.perf_counter() - before_s)
    return statistics.median(samples)

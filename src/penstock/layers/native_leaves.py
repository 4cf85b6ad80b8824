"""The leaves of a model that the native library computes.

Owns what each leaf records and how it takes in its weights. A leaf that is called appends ops to a
program; the values between leaves are `Buffer`s, and the batch is not looked at: ops read the step.

Invariant: a stored tensor is quantized and packed once, straight from the mapped file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from penstock.errors import EngineError, ModelLoadError
from penstock.layers.scaling import RopeScaling, frequencies
from penstock.layers.toolkit import Batch, Part, StoredTensor, Weight
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.program import Buffer, Program
from penstock.native.structs import (
    AnglesArgs,
    AttentionArgs,
    EmbedArgs,
    Epilogue,
    LinearArgs,
    NormArgs,
    OpKind,
    RopeArgs,
    Rows,
)
from penstock.native.weights import (
    PANEL_ROWS,
    PackedVector,
    PackedWeight,
    Placement,
    padded_rows,
)
from penstock.quantization.schemes import Format, Scheme

F32 = NDArray[np.float32]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class NativeMaterials:
    """What the leaves of one model are made of."""

    program: Program
    arena: Arena  # of the weights
    dtype: str  # of activations: float32 or bfloat16
    scheme: Scheme
    kv: KVMemory

    def matrix(self, form: Format, num_rows: int, num_columns: int) -> PackedWeight:
        """Memory for a matrix."""
        pool = self.program.pool
        return PackedWeight(pool, form.dtype, form.group_size, num_rows, num_columns, self.arena)


class Embedding:
    """One vector for each token id, out of a packed table. The residual stream is float32."""

    def __init__(self, name: str, num_rows: int, size: int, materials: NativeMaterials) -> None:
        self.name = name
        self.table = materials.matrix(materials.scheme.table, num_rows, size)
        self._program = materials.program

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]."""
        yield _matrix(self.name, self.table)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, batch: Batch) -> Buffer:
        """Vectors [T, size] of the step's ids."""
        size = self.table.num_columns
        out = self._program.value(size, "float32")
        args = EmbedArgs(table=self.table.struct, out_stride=size)
        self._program.append(OpKind.EMBED, args, out=out)
        return out


class Linear:
    """y = x W^T + b, where the rows of W are those of its parts.

    Those of a gated one, gate and up, lie in turns, a panel of each, so that one task of the op
    has both.
    """

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool,
        materials: NativeMaterials,
    ) -> None:
        self._gated = gated
        self._materials = materials
        self._num_outputs = parts[0].num_rows if gated else sum(part.num_rows for part in parts)
        self._parts: list[tuple[Part, Placement]] = []
        first = 0
        for part in parts:
            self._parts.append((part, Placement(first, 2 if gated else 1)))
            first += PANEL_ROWS if gated else part.num_rows
        num_rows = 2 * padded_rows(self._num_outputs) if gated else first
        self.weight = materials.matrix(materials.scheme.linear, num_rows, in_size)
        self.bias = PackedVector(padded_rows(num_rows), materials.arena) if bias else None

    def weights(self) -> Iterator[Weight]:
        """Weight and bias of every part."""
        for part, placement in self._parts:
            shape = (part.num_rows, self.weight.num_columns)
            load = partial(_pack, self.weight, placement)
            yield Weight(f"{part.name}.weight", shape, load)
            if self.bias is not None:
                load = partial(_fill, self.bias.values, placement)
                yield Weight(f"{part.name}.bias", (part.num_rows,), load)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, x: Buffer) -> Buffer:
        """Map x [T, in] to [T, out]; gated: to [T, out / 2]."""
        materials = self._materials
        y = materials.program.value(self._num_outputs, materials.dtype)
        epilogue = Epilogue.SILU_MUL if self._gated else Epilogue.STORE
        args = _product(materials, self.weight, x, y, Rows.TOKENS, epilogue)
        if self.bias is not None:
            args.bias = self.bias.values.ctypes.data
        materials.program.append(OpKind.LINEAR, args, x=x, y=y)
        return y


class Norm:
    """Root mean square norm of the residual stream, after a sum. It may be called many times."""

    def __init__(self, name: str, size: int, eps: float, materials: NativeMaterials) -> None:
        self.name = name
        self.weight = PackedVector(size, materials.arena)
        self._size = size
        self._loaded = np.ones(size, np.float32)
        self._eps = eps
        self._materials = materials

    def weights(self) -> Iterator[Weight]:
        """The scale, [size]."""
        load = partial(_fill, self._loaded, Placement())
        yield Weight(f"{self.name}.weight", (self._size,), load)

    def finish(self) -> None:
        """Put the scale among the weights."""
        self.weight.values[:] = self._loaded

    def add(self, residual: Buffer, x: Buffer | None) -> Buffer:
        """Add x, if any, to the residual stream in place; the norm of the sum."""
        size, program = self._size, self._materials.program
        out = program.value(size, self._materials.dtype)
        args = NormArgs(
            residual_stride=size,
            x_stride=size,
            weight=self.weight.values.ctypes.data,
            out_stride=size,
            size=size,
            eps=self._eps,
            dtype=out.dtype_id,
        )
        if x is None:
            program.append(OpKind.NORM, args, residual=residual, out=out)
        else:
            program.append(OpKind.NORM, args, residual=residual, x=x, out=out)
        return out


class Rotary:
    """Rotates the first heads of whatever is given; the angles are computed once a step."""

    def __init__(
        self,
        num_rotated: int,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
        program: Program,
    ) -> None:
        self._frequencies = frequencies(head_dim, theta, scaling)
        self._num_rotated = num_rotated
        self._program = program
        self._angles: Buffer | None = None

    def __call__(self, qkv: Buffer, batch: Batch) -> Buffer:
        """Rotate the first heads of qkv [T, any * D] in place."""
        half = len(self._frequencies)
        if self._angles is None:
            self._angles = self._program.value(2 * half, "float32")
            angles = AnglesArgs(frequencies=self._frequencies.ctypes.data, half=half)
            self._program.append(OpKind.ANGLES, angles, out=self._angles)
        args = RopeArgs(
            stride=qkv.width, half=half, num_heads=self._num_rotated, dtype=qkv.dtype_id
        )
        self._program.append(OpKind.ROPE, args, angles=self._angles, x=qkv)
        return qkv


class Attention:
    """One layer's attention over the paged keys and values."""

    def __init__(
        self,
        kv_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        materials: NativeMaterials,
    ) -> None:
        kv = materials.kv
        self._program = materials.program
        self._width = num_heads * head_dim
        self._args = AttentionArgs(
            kv=kv.layer(kv_index),
            kv_scales=kv.layer_scales(kv_index),
            num_slots=kv.num_slots,
            kv_dtype=kv.dtype_id,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=scale,
        )

    def __call__(self, qkv: Buffer, batch: Batch) -> Buffer:
        """[T, H * D] of qkv [T, (H + 2 * Hkv) * D]. A layer has one place in the program."""
        args = self._args
        out = self._program.value(self._width, qkv.dtype)
        args.dtype, args.qkv_stride, args.out_stride = qkv.dtype_id, qkv.width, out.width
        self._program.append(OpKind.ATTENTION, args, qkv=qkv, out=out)
        return out


class Head:
    """Scores of all token ids, for the rows of a step that want logits."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: NativeMaterials,
        *,
        tied_to: Embedding | None = None,
    ) -> None:
        self.name = name
        self._materials = materials
        self._tied_to = tied_to
        self.table = (
            materials.matrix(materials.scheme.table, num_rows, size)
            if tied_to is None
            else tied_to.table
        )

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one."""
        duplicate_of = None if self._tied_to is None else f"{self._tied_to.name}.weight"
        yield _matrix(self.name, self.table)._replace(duplicate_of=duplicate_of)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, hidden: Buffer) -> Buffer:
        """Logits [L, V], float32, of the step's logit rows of hidden [T, size]."""
        program = self._materials.program
        logits = program.value(self.table.num_rows, "float32", Rows.LOGITS)
        args = _product(self._materials, self.table, hidden, logits, Rows.LOGITS, Epilogue.STORE)
        program.append(OpKind.LINEAR, args, x=hidden, y=logits)
        return logits


def _product(
    materials: NativeMaterials,
    weight: PackedWeight,
    x: Buffer,
    y: Buffer,
    rows: Rows,
    epilogue: Epilogue,
) -> LinearArgs:
    return LinearArgs(
        weight=weight.struct,
        x_stride=x.width,
        y_stride=y.width,
        x_dtype=x.dtype_id,
        y_dtype=y.dtype_id,
        rows=rows,
        epilogue=epilogue,
        activation_bits=materials.scheme.activation_bits,
        num_outputs=y.width,
    )


def _matrix(name: str, weight: PackedWeight) -> Weight:
    """A weight that fills a whole matrix."""
    load = partial(_pack, weight, Placement())
    return Weight(f"{name}.weight", (weight.num_rows, weight.num_columns), load)


def _pack(weight: PackedWeight, placement: Placement, stored: StoredTensor) -> None:
    try:
        weight.pack(stored.data, _DTYPES[stored.dtype], stored.shape[0], placement)
    except EngineError as error:
        raise ModelLoadError(f"`{stored.name}` cannot be packed: {error.message}") from error


def _fill(vector: F32, placement: Placement, stored: StoredTensor) -> None:
    """Convert a stored vector into its places in `vector`."""
    raw = stored.data.tobytes()
    match stored.dtype:
        case "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F16":
            values = np.frombuffer(raw, np.float16).astype(np.float32)
        case _:
            values = np.frombuffer(raw, np.float32)
    vector[placement.rows(len(values))] = values

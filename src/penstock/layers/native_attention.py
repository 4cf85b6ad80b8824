"""Attention over the paged keys and values of a layer, by the native library: grouped and latent.

Owns sinks and the maps from and to latents. A leaf has one place in the program.
Invariant: what one leaf writes to the KV memory no other one reads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from penstock.layers.native_linear import product_args
from penstock.layers.native_materials import (
    F32,
    Matrix,
    NativeMaterials,
    numbers,
    pack,
    vector_weight,
)
from penstock.layers.specs import AttentionSpec, LatentSpec
from penstock.layers.toolkit import Batch, Stored, StoredTensor, Weight
from penstock.native.program import Buffer
from penstock.native.structs import AttentionArgs, CopyArgs, OpKind
from penstock.native.weights import Placement, padded_rows


class Attention:
    """One layer's grouped-query attention."""

    def __init__(
        self, kv_index: int, spec: AttentionSpec, sinks: str | None, materials: NativeMaterials
    ) -> None:
        self._kv_index = kv_index
        self._spec = spec
        self._sinks_name = sinks
        self._sinks = None if sinks is None else materials.vector(spec.num_heads)
        self._materials = materials

    def weights(self) -> Iterator[Weight]:
        """The sinks, [H], if there are any."""
        if self._sinks is not None and self._sinks_name is not None:
            yield vector_weight(self._sinks_name, self._sinks.values, self._spec.num_heads)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, qkv: Buffer, batch: Batch) -> Buffer:
        """[T, H * D] of qkv [T, (H + 2 * Hkv) * D]."""
        spec, program = self._spec, self._materials.program
        out = program.value(spec.q_size, qkv.dtype)
        args = _args(self._materials, self._kv_index, qkv, out)
        if self._sinks is not None:
            args.sinks = self._sinks.values.ctypes.data
        args.window, args.softcap, args.is_causal = spec.window, spec.softcap, spec.is_causal
        args.num_heads, args.num_kv_heads = spec.num_heads, spec.num_kv_heads
        args.head_dim = args.value_dim = spec.head_dim
        args.scale = spec.scale
        program.append(OpKind.ATTENTION, args, qkv=qkv, out=out)
        return out


class LatentAttention:
    """Latent attention, absorbed: queries are mapped to latents, and attend to these.

    Both maps are block-diagonal, a block for each head: from the plain part of its query, and to
    its values. The first is the checkpoint's map to keys, transposed.
    """

    def __init__(
        self, kv_index: int, spec: LatentSpec, name: str, materials: NativeMaterials
    ) -> None:
        self.name = name
        self._kv_index = kv_index
        self._spec = spec
        self._materials = materials
        # A transposed map has other rows than the checkpoint, and so no codes of its.
        form, heads = materials.formats.scheme.linear, spec.num_heads
        num_rows = heads * padded_rows(spec.rank)
        self._to_latents = materials.matrix(form, num_rows, spec.nope_dim)
        num_rows = heads * padded_rows(spec.value_dim)
        self._to_values = materials.matrix(form, num_rows, spec.rank)

    def weights(self) -> Iterator[Weight]:
        """The map to keys and values, head by head: [H * (nope_dim + value_dim), rank]."""
        spec = self._spec
        shape = spec.num_heads * (spec.nope_dim + spec.value_dim), spec.rank
        yield Weight(f"{self.name}.weight", shape, self._load)

    def _load(self, stored: Stored) -> None:
        spec = self._spec
        heads = numbers(stored).reshape(spec.num_heads, -1, spec.rank)
        for number, head in enumerate(heads):
            to_keys, to_values = head[: spec.nope_dim], head[spec.nope_dim :]
            self._pack(stored.name, self._to_latents, number, to_keys.T)
            self._pack(stored.name, self._to_values, number, to_values)

    def _pack(self, name: str, matrix: Matrix, number: int, block: F32) -> None:
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        first = number * padded_rows(len(block))
        pack(matrix, Placement(first), StoredTensor(name, "F32", block.shape, data))

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, q: Buffer, latent: Buffer, batch: Batch) -> Buffer:
        """[T, H * value_dim] of q [T, H * key_dim] and latent [T, rank + rope dim]."""
        spec, materials = self._spec, self._materials
        size = spec.rank + spec.rope.dim
        queries = materials.program.value(spec.num_heads * size, q.dtype)
        self._map(self._to_latents, q, spec.key_dim, queries, size, spec.rank)
        copy = CopyArgs(
            from_stride=q.width,
            from_group_stride=spec.key_dim,
            to_stride=queries.width,
            to_group_stride=size,
            num_groups=spec.num_heads,
            size=spec.rope.dim,
            dtype=q.dtype_id,
        )
        source, target = q.columns(spec.nope_dim), queries.columns(spec.rank)
        materials.program.append(OpKind.COPY, copy, **{"from": source, "to": target})

        out = materials.program.value(spec.num_heads * spec.rank, q.dtype)
        args = _args(materials, self._kv_index, queries, out)
        args.latent_stride, args.is_causal, args.scale = latent.width, True, spec.scale
        args.num_heads, args.num_kv_heads = spec.num_heads, 1
        args.head_dim, args.value_dim = size, spec.rank
        materials.program.append(OpKind.ATTENTION, args, qkv=queries, latent=latent, out=out)

        values = materials.value(spec.num_heads * spec.value_dim)
        self._map(self._to_values, out, spec.rank, values, spec.value_dim, spec.value_dim)
        return values

    def _map(
        self,
        weight: Matrix,
        x: Buffer,
        x_group_stride: int,
        y: Buffer,
        y_group_stride: int,
        num_outputs: int,
    ) -> None:
        """Each head's numbers of x by its own block of the matrix."""
        args = product_args(self._materials, weight, x, y, num_outputs)
        args.num_groups = self._spec.num_heads
        args.x_group_stride, args.y_group_stride = x_group_stride, y_group_stride
        self._materials.program.append(OpKind.LINEAR, args, x=x, y=y)


def _args(materials: NativeMaterials, kv_index: int, qkv: Buffer, out: Buffer) -> AttentionArgs:
    """What both kinds say of their operands and of the KV memory."""
    kv = materials.kv
    return AttentionArgs(
        qkv_stride=qkv.width,
        out_stride=out.width,
        kv=kv.layer(kv_index),
        kv_scales=kv.layer_scales(kv_index),
        num_slots=kv.num_slots,
        dtype=qkv.dtype_id,
        kv_dtype=kv.dtype_id,
    )

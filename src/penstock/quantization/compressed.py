"""Checkpoints of compressed-tensors, which llm-compressor writes.

Knows its formats pack-quantized (integers of 4 or 8 bits in int32 words along the columns),
int-quantized, float-quantized and naive-quantized (a byte each), as its own compressors define them
(https://github.com/vllm-project/compressed-tensors, 0.20), and how its config gives schemes to
modules. Activations of 8-bit integers by token are computed so; all others in 16 bits.

Invariant: what is decoded is what was asked for. Symmetric values are exact in float32; asymmetric
ones are where the scales have 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import CodedTensor, CodeForm, CodeRows, StoredTensor
from penstock.quantization.compressed_config import Scheme, Schemes
from penstock.quantization.modules import Keys
from penstock.quantization.pieces import (
    BlockScales,
    Joined,
    Pieces,
    Suffixes,
    join_pieces,
    minima_of,
    nibbles,
    told,
)

_SUFFIXES = Suffixes(
    leads=(".weight_scale",),
    others=(
        ".weight_packed", ".weight_zero_point", ".weight_shape", ".weight_g_idx",
        ".weight_global_scale",
    ),
    shared=(".weight",),
    dropped=(".input_scale", ".input_zero_point", ".input_g_idx"),
)  # fmt: skip


class Compressed:
    """A checkpoint of this library, from its `quantization_config`."""

    def __init__(self, keys: Keys) -> None:
        self._schemes = Schemes(keys)
        schemes = self._schemes.all
        has_rows = any(scheme.form == CodeForm("int8", 0) for scheme in schemes)
        # Only whole rows of int8 meet activations of 8 bits (`quantization.schemes.coded`).
        self.activation_bits = max(s.activation_bits for s in schemes) if has_rows else 16
        told_schemes = " and ".join(dict.fromkeys(scheme.told for scheme in schemes))
        self.name = (
            f"compressed-tensors, {told_schemes}, activations in {self.activation_bits} bits"
        )

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of a weight by its name; None: it is stored plainly."""
        scheme = self._schemes.of(name.removesuffix(".weight"))
        return None if scheme is None else scheme.form

    def join(self, tensors: Sequence[StoredTensor]) -> list[Joined]:
        """See `penstock.quantization.stored.StoredPrecision`."""
        return join_pieces(tensors, _SUFFIXES, self._made)

    def _made(self, pieces: Pieces) -> list[Joined]:
        scheme = self._schemes.of(pieces.name, is_coded=True)
        if scheme is None:
            raise pieces.wrong(".weight_scale", "belongs to a module that the config leaves plain")
        for suffix, key in ((".weight_g_idx", "actorder"), (".weight_global_scale", "strategy")):
            if pieces.has(suffix):
                raise UnsupportedModel(
                    f"`{told(pieces.name + suffix)}` is there, which a `{key}` that is not "
                    "implemented has left."
                )
        codes, shape = _codes_of(pieces, scheme)
        num_rows, num_columns = shape
        num_groups = -(-num_columns // scheme.group_size) if scheme.group_size else 1
        scale_rows, rows_each = {
            "tensor": (1, num_rows),
            "block": (-(-num_rows // scheme.block_rows), scheme.block_rows),
        }.get(scheme.strategy, (num_rows, 1))
        scales = BlockScales(pieces, ".weight_scale", (scale_rows, num_groups), rows_each)
        zeros = None
        if not scheme.is_symmetric:
            zeros = _Zeros(pieces, scheme, num_rows, num_groups)
        elif pieces.has(zero := ".weight_zero_point") and pieces.array(zero, ("I8",)).any():
            raise pieces.wrong(zero, "is not zero, where the config says `symmetric`")
        read = partial(_rows, pieces.name, scheme, codes, scales, zeros, num_columns)
        name = f"{pieces.name}.weight"
        return [CodedTensor(name, scheme.form, shape, pieces.num_bytes, read)]


def _codes_of(pieces: Pieces, scheme: Scheme) -> tuple[NDArray[Any], tuple[int, int]]:
    """What the codes lie in, and the shape of the weight."""
    if not scheme.is_packed:
        codes = pieces.array(".weight", ("F8_E4M3",) if scheme.is_float else ("I8",), (None, None))
        return codes, (codes.shape[0], codes.shape[1])
    packed = pieces.array(".weight_packed", ("I32",), (None, None))
    num_rows, num_columns = pieces.array(".weight_shape", ("I64", "I32"), (2,)).tolist()
    num_words = -(-num_columns * scheme.bits // 32)
    if num_columns < 0 or packed.shape != (num_rows, num_words):
        raise pieces.wrong(
            ".weight_packed",
            f"has shape {list(packed.shape)}, not that of [{num_rows}, {num_columns}] numbers of "
            f"{scheme.bits} bits",
        )
    return packed, (num_rows, num_columns)


class _Zeros:
    """Zero points, counted from the least code: a byte each, or packed along the rows."""

    def __init__(self, pieces: Pieces, scheme: Scheme, num_rows: int, num_groups: int) -> None:
        self._bits = scheme.bits
        self._is_packed = scheme.is_packed and scheme.strategy != "tensor"
        suffix = ".weight_zero_point"
        if self._is_packed:
            shape = (-(-num_rows * scheme.bits // 32), num_groups)
            self._stored = pieces.array(suffix, ("I32",), shape)
            return
        stored = pieces.array(suffix, ("I8",))
        if stored.size not in (1, num_rows * num_groups):
            raise pieces.wrong(suffix, f"has shape {list(stored.shape)}, unlike its scales")
        shape = (1, 1) if stored.size == 1 else (num_rows, num_groups)
        self._stored = np.broadcast_to(stored.reshape(shape), (num_rows, num_groups))

    def rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """Of the rows [first, last), [n, G]."""
        if not self._is_packed:
            return self._stored[first:last].view(np.uint8) + np.uint8(1 << (self._bits - 1))
        per_word = 32 // self._bits
        start = first // per_word
        words = np.ascontiguousarray(self._stored[start : -(-last // per_word)].T)
        octets = words.view(np.uint8)
        found = nibbles(octets, 2 * octets.shape[1]) if self._bits == 4 else octets
        return found[:, first - start * per_word : last - start * per_word].T


def _rows(
    name: str,
    scheme: Scheme,
    stored: NDArray[Any],
    scales: BlockScales,
    zeros: _Zeros | None,
    num_columns: int,
    first: int,
    last: int,
) -> CodeRows:
    """Rows [first, last) of a weight."""
    octets = stored[first:last].copy().view(np.uint8)  # never a view: it is changed
    middle = np.uint8(1 << (scheme.bits - 1))
    factors = scales.rows(first, last)
    if scheme.is_float:
        return CodeRows(octets, factors)
    if scheme.is_packed:  # as codes that count from the least one
        codes = nibbles(octets, num_columns) if scheme.bits == 4 else octets[:, :num_columns]
    else:
        codes = octets
        codes += middle
    if scheme.bits == 4 and codes.size and codes.max() > 15:
        raise ModelLoadError(f"`{told(name)}.weight` has numbers that need more than 4 bits.")
    if zeros is not None:
        return CodeRows(codes, factors, minima_of(factors, zeros.rows(first, last)))
    codes ^= middle  # less the middle, in two's complement
    return CodeRows(codes, factors)

"""AWQ checkpoints: 4-bit integers, packed along the rows of the weight in an order of their own.

Knows the "gemm" layout of AutoAWQ (https://github.com/casper-hansen/AutoAWQ, `WQLinear_GEMM`; the
method is Lin et al. 2023). For a weight [N, K] in groups of G columns: `qweight` int32 [K, N / 8],
`qzeros` int32 [K / G, N / 8], `scales` [K / G, N]. The i-th nibble of a word, from below, is of row
`_ROWS[i]` of its eight. Value = scale * (code - zero).

Invariant: what is decoded is what was asked for; a matrix is never held in float32. With scales of
16 bits the values are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.quantization.codes import U8, CodedTensor, CodeForm, CodeRows, StoredTensor
from penstock.quantization.modules import Keys, Listed, is_in_block, last_part
from penstock.quantization.pieces import (
    FLOATS,
    Joined,
    Pieces,
    Suffixes,
    floats_of,
    join_pieces,
    minima_of,
)

_SUFFIXES = Suffixes((".qweight",), (".qzeros", ".scales"))
_PER_WORD = 8
_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """A checkpoint in this format, from its `quantization_config`."""

    activation_bits = 16

    def __init__(self, keys: Keys) -> None:
        bits = "bits" if keys.config.get("bits") is not None else "w_bit"  # AutoAWQ's own name
        keys.choice(bits, (4,))
        version = "version" if keys.config.get("version") is not None else "format"
        keys.choice(version, ("gemm",), "gemm")
        keys.choice("zero_point", (True,), True)
        size = "group_size" if keys.config.get("group_size") is not None else "q_group_size"
        group_size = keys.group_size(size, 128)
        self._has_head = keys.flag("lm_head", False)
        self._skipped = Listed(
            keys.names("modules_to_not_convert") or [], f"{keys.prefix}modules_to_not_convert"
        )
        self._form = CodeForm("uint4", group_size, has_minima=True)
        groups = f"groups of {group_size}" if group_size else "whole rows"
        self.name = f"AWQ, 4 bits in {groups}"

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of a weight by its name; None: it is stored plainly."""
        module = name.removesuffix(".weight")
        is_meant = is_in_block(module) or (self._has_head and last_part(module) == "lm_head")
        return self._form if is_meant and not self._skipped.has(module) else None

    def join(self, tensors: Sequence[StoredTensor]) -> list[Joined]:
        """See `penstock.quantization.stored.StoredPrecision`."""
        return join_pieces(tensors, _SUFFIXES, self._made)

    def _made(self, pieces: Pieces) -> list[Joined]:
        packed = pieces.array(".qweight", ("I32",), (None, None))
        num_columns, num_words = packed.shape
        num_rows = num_words * _PER_WORD
        num_groups = -(-num_columns // (self._form.group_size or num_columns))
        zeros = pieces.array(".qzeros", ("I32",), (num_groups, num_words))
        scales = pieces.array(".scales", FLOATS, (num_groups, num_rows))
        read = partial(_rows, packed, zeros, scales)
        name, shape = f"{pieces.name}.weight", (num_rows, num_columns)
        return [CodedTensor(name, self._form, shape, pieces.num_bytes, read)]


def _rows(
    packed: NDArray[np.int32],
    zeros: NDArray[np.int32],
    scales: NDArray[Any],
    first: int,
    last: int,
) -> CodeRows:
    """Rows [first, last) of the weight: columns of what is stored."""
    factors = np.ascontiguousarray(floats_of(scales[:, first:last]).T)
    minima = minima_of(factors, _unpacked(zeros, first, last))
    return CodeRows(_unpacked(packed, first, last), factors, minima)


def _unpacked(packed: NDArray[np.int32], first: int, last: int) -> U8:
    """Rows [first, last) of what is packed along them: [columns, words] to [n, columns]."""
    start, stop = first // _PER_WORD, -(-last // _PER_WORD)
    words = np.ascontiguousarray(packed[:, start:stop].T)
    octets = words.view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((len(words), _PER_WORD, words.shape[1]), np.uint8)
    for index in range(4):
        np.bitwise_and(octets[..., index], 15, out=codes[:, _ROWS[2 * index]])
        np.right_shift(octets[..., index], 4, out=codes[:, _ROWS[2 * index + 1]])
    unpacked = codes.reshape(-1, words.shape[1])
    return unpacked[first - start * _PER_WORD : last - start * _PER_WORD]

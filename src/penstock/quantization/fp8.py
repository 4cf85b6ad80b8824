"""fp8 checkpoints: numbers of 8 bits with a scale for each block, row or matrix.

Knows what DeepSeek-V3 and Qwen publish and transformers' `finegrained_fp8` writes: `weight` F8_E4M3
[N, K] with `weight_scale_inv` [N / rows, K / columns], rounded up, for blocks of
`weight_block_size`; and the older kind with one `weight_scale` (AutoFP8). Despite its name the
scale is multiplied. Activations are computed in 16 bits, whatever the checkpoint asks for: the
scales of static ones are not needed and dropped.

Invariant: what is decoded is what was asked for; the values are those of the reference, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from penstock.quantization.codes import U8, CodedTensor, CodeForm, CodeRows, StoredTensor
from penstock.quantization.modules import HEADS, Keys, Listed, is_linear, last_part
from penstock.quantization.pieces import BlockScales, Joined, Pieces, Suffixes, join_pieces

_SUFFIXES = Suffixes(
    leads=(".weight_scale_inv", ".weight_scale"),
    shared=(".weight",),
    dropped=(".input_scale", ".activation_scale"),
)
_MAX_BLOCK = 2**20


class Fp8:
    """A checkpoint in this format, from its `quantization_config`."""

    activation_bits = 16

    def __init__(self, keys: Keys) -> None:
        keys.refuse("modules_to_convert", "kv_cache_scheme")
        keys.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        keys.choice("scale_fmt", ("float", "ue8m0"), "float")  # as the scales' type says
        keys.choice("expert_dtype", ("fp8",), "fp8")
        keys.choice("activation_scheme", ("dynamic", "static"), "dynamic")
        self._block = _block(keys)
        given = "modules_to_not_convert"
        if keys.config.get(given) is None:
            given = "ignored_layers"
        listed = keys.names(given)
        self._keeps_head = listed is None  # then transformers leaves the head as it is
        self._skipped = Listed(listed or [], keys.prefix + given)
        self._form = CodeForm("e4m3", self._block[1] if self._block else 0)
        blocks = f"blocks of {self._block[0]} x {self._block[1]}" if self._block else "a scale each"
        self.name = f"fp8, {blocks}, activations in 16 bits"

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of a weight by its name; None: it is stored plainly."""
        module = name.removesuffix(".weight")
        if not is_linear(module) or self._skipped.has(module):
            return None
        return None if self._keeps_head and last_part(module) in HEADS else self._form

    def join(self, tensors: Sequence[StoredTensor]) -> list[Joined]:
        """See `penstock.quantization.stored.StoredPrecision`."""
        return join_pieces(tensors, _SUFFIXES, self._made)

    def _made(self, pieces: Pieces) -> list[Joined]:
        suffix = ".weight_scale_inv" if pieces.has(".weight_scale_inv") else ".weight_scale"
        codes = pieces.array(".weight", ("F8_E4M3",), (None, None))
        num_rows, num_columns = codes.shape
        if self._block is None:
            scales = BlockScales(pieces, suffix, (1, 1), num_rows)
        else:
            shape = (-(-num_rows // self._block[0]), -(-num_columns // self._block[1]))
            scales = BlockScales(pieces, suffix, shape, self._block[0])
        read = partial(_rows, codes, scales)
        name = f"{pieces.name}.weight"
        return [CodedTensor(name, self._form, (num_rows, num_columns), pieces.num_bytes, read)]


def _rows(codes: U8, scales: BlockScales, first: int, last: int) -> CodeRows:
    return CodeRows(codes[first:last], scales.rows(first, last))


def _block(keys: Keys) -> tuple[int, int] | None:
    """Rows and columns that share a scale, or None for the whole matrix."""
    key = "weight_block_size"
    value = keys.config.get(key)
    if value is None:
        return None
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and 0 < size <= _MAX_BLOCK for size in value)
        and (value[1] == 16 or value[1] % 32 == 0)
    ):
        raise keys.error(key, "a number of rows and one of columns, 16 or a multiple of 32")
    return value[0], value[1]

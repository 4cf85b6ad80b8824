"""bitsandbytes checkpoints: 4-bit codes in blocks that run on over the rows, and 8-bit rows.

Knows what bitsandbytes writes (https://github.com/bitsandbytes-foundation/bitsandbytes,
`QuantState.as_dict`; Dettmers et al., QLoRA 2023 and LLM.int8() 2022). 4 bits: `weight` U8
[N * K / 2, 1], the first of two codes in the upper half, `weight.absmax` a scale for each block,
`weight.quant_map` what codes mean, `weight.quant_state.bitsandbytes__nf4` the rest as JSON. Scales
may be codes themselves ("double quantization"). 8 bits: `weight` I8 [N, K] and `SCB` [N], the
largest absolute value of each row, which 127 stands for.

bitsandbytes' fp4 is not the fp4 of other formats: it has 1/192 where e2m1 has 1/12. Its sixteen
numbers times 12 are numbers of e4m3, so that it is held as those, in 8 bits. Outliers of LLM.int8()
need no care, because activations are computed in 16 bits.

Invariant: nf4 and 8 bits are exact in float32; fp4 differs by the rounding of a scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import UnsupportedModel
from penstock.quantization.codes import F32, U8, CodedTensor, CodeForm, CodeRows, StoredTensor, book
from penstock.quantization.modules import HEADS, Keys, Listed, is_linear, last_part
from penstock.quantization.pieces import Joined, Pieces, Suffixes, join_pieces, nibbles, told

_BLOCK = 64  # numbers that share a scale, wherever these checkpoints come from
_STATE = ".weight.quant_state.bitsandbytes__"
_SUFFIXES = Suffixes(
    leads=(_STATE + "nf4", _STATE + "fp4"),
    others=(
        ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    ),
    shared=(".weight",),
)  # fmt: skip
_BYTES = Suffixes(leads=(".SCB",), others=(".weight_format",), shared=(".weight",))
_MAX_STATE_BYTES = 65536
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by code, times 12; 8 more are negative


class BitsAndBytes:
    """A checkpoint in this format, from its `quantization_config`."""

    activation_bits = 16

    def __init__(self, keys: Keys) -> None:
        self._is_bytes = keys.flag("load_in_8bit", False)
        if self._is_bytes == keys.flag("load_in_4bit", False):
            raise keys.error("load_in_4bit", "true, or else `load_in_8bit`, and not both")
        self._kind: str = keys.choice("bnb_4bit_quant_type", ("fp4", "nf4"), "fp4")
        if not self._is_bytes:
            keys.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
        listed = keys.names("llm_int8_skip_modules")
        self._keeps_head = listed is None  # then transformers leaves the head as it is
        self._skipped = Listed(listed or [], f"{keys.prefix}llm_int8_skip_modules")
        kind = "8 bits" if self._is_bytes else self._kind
        held = ", held in 8 bits" if kind == "fp4" else ""
        self.name = f"bitsandbytes {kind}{held}, activations in 16 bits"

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of a weight by its name; None: it is stored plainly.

        Raises:
            UnsupportedModel: blocks of 64 do not lie in its rows as groups of 16 or of 32.
        """
        module = name.removesuffix(".weight")
        if not is_linear(module) or self._skipped.has(module):
            return None
        if self._keeps_head and last_part(module) in HEADS:
            return None
        return CodeForm("int8", 0) if self._is_bytes else _form(self._kind, name, shape)

    def join(self, tensors: Sequence[StoredTensor]) -> list[Joined]:
        """See `penstock.quantization.stored.StoredPrecision`."""
        if self._is_bytes:
            return join_pieces(tensors, _BYTES, _made_of_bytes)
        return join_pieces(tensors, _SUFFIXES, _made)


def _form(kind: str, name: str, shape: tuple[int, int]) -> CodeForm:
    group_size = math.gcd(shape[1], _BLOCK)
    if group_size < 16:
        raise UnsupportedModel(
            f"`{told(name)}` has rows of `{shape[1]}` numbers, over which the blocks of {_BLOCK} "
            "of bitsandbytes run on; they must be a multiple of 16.",
            hint="use a checkpoint without quantization, or in another format.",
        )
    return CodeForm("nf4" if kind == "nf4" else "e4m3", group_size)


class _Absmax(NamedTuple):
    """Scales of blocks; as codes, with scales of their own."""

    stored: NDArray[Any]  # [blocks], float32 or codes
    numbers: F32 | None = None  # [256], what the codes mean
    scales: F32 | None = None  # of their blocks
    block: int = 1
    offset: np.float32 = np.float32(0)

    def of(self, first: int, last: int) -> F32:
        """Of the blocks [first, last)."""
        stored = self.stored[first:last]
        if self.numbers is None or self.scales is None:
            return stored.astype(np.float32)
        scales = self.scales[np.arange(first, last) // self.block]
        found: F32 = self.numbers[stored] * scales + self.offset
        return found


def _made(pieces: Pieces) -> list[Joined]:
    """The weight of 4-bit codes."""
    kind = "nf4" if pieces.has(_STATE + "nf4") else "fp4"
    lead = _STATE + kind
    state = _state(pieces, lead)
    shape = state.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        raise pieces.wrong(lead, "has no `shape` of two sizes")
    if state.get("quant_type") != kind:
        raise pieces.wrong(lead, f"has a `quant_type` other than `{kind}`")
    if state.get("blocksize") != _BLOCK:
        raise pieces.wrong(lead, f"has a `blocksize` other than `{_BLOCK}`")
    num_rows, num_columns = shape
    form = _form(kind, f"{pieces.name}.weight", (num_rows, num_columns))
    packed = pieces.array(".weight", ("U8",), (num_rows * num_columns // 2, 1))
    _check_book(pieces, kind)
    absmax = _absmax(pieces, state, lead, -(-num_rows * num_columns // _BLOCK))
    read = partial(_rows, form, packed.reshape(num_rows, -1), absmax)
    name = f"{pieces.name}.weight"
    return [CodedTensor(name, form, (num_rows, num_columns), pieces.num_bytes, read)]


def _state(pieces: Pieces, lead: str) -> Mapping[str, Any]:
    blob = pieces.array(lead, ("U8",), (None,))
    if blob.size > _MAX_STATE_BYTES:
        raise pieces.wrong(lead, f"has more than `{_MAX_STATE_BYTES}` bytes")
    try:
        state = json.loads(blob.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise pieces.wrong(lead, "is not JSON") from error
    if not isinstance(state, dict):
        raise pieces.wrong(lead, "is not a JSON object")
    return state


def _check_book(pieces: Pieces, kind: str) -> None:
    """Refuse codes that mean other numbers than ours."""
    found = pieces.array(".weight.quant_map", ("F32",), (16,))
    half = np.array(_FP4, np.float32) / np.float32(12)
    wanted = book("nf4") if kind == "nf4" else np.concatenate([half, -half])
    if not np.array_equal(found, wanted):
        raise pieces.wrong(".weight.quant_map", f"is not the book of {kind}")


def _absmax(pieces: Pieces, state: Mapping[str, Any], lead: str, num_blocks: int) -> _Absmax:
    if not pieces.has(".weight.nested_absmax"):
        return _Absmax(pieces.array(".weight.absmax", ("F32",), (num_blocks,)))
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or not 0 < block < 2**31:
        raise pieces.wrong(lead, "has no `nested_blocksize`")
    if not isinstance(offset, (int, float)) or not abs(offset) < 1e38:
        raise pieces.wrong(lead, "has no `nested_offset`")
    return _Absmax(
        pieces.array(".weight.absmax", ("U8",), (num_blocks,)),
        pieces.array(".weight.nested_quant_map", ("F32",), (256,)),
        pieces.array(".weight.nested_absmax", ("F32",), (-(-num_blocks // block),)),
        block,
        np.float32(offset),
    )


def _rows(form: CodeForm, packed: U8, absmax: _Absmax, first: int, last: int) -> CodeRows:
    """Rows [first, last) of a weight of 4-bit codes."""
    octets = packed[first:last]
    num_columns = 2 * octets.shape[1]
    codes = nibbles(np.bitwise_or(octets >> 4, octets << 4, dtype=np.uint8), num_columns)
    per_row = num_columns // form.group_size
    # A block may end in the middle of a row: groups are as long as what both have in common.
    blocks = np.arange(first * per_row, last * per_row) * form.group_size // _BLOCK
    start, stop = (int(blocks[0]), int(blocks[-1]) + 1) if blocks.size else (0, 0)
    scales = absmax.of(start, stop)[blocks - start].reshape(-1, per_row)
    if form.code == "nf4":
        return CodeRows(codes, scales)
    return CodeRows(_e4m3_of_fp4()[codes], scales / np.float32(12))


def _e4m3_of_fp4() -> U8:
    """The code of e4m3 for each code of fp4, [16]."""
    half = [int(np.flatnonzero(book("e4m3") == number)[0]) for number in _FP4]
    return np.array([*half, *(code | 0x80 for code in half)], np.uint8)


def _made_of_bytes(pieces: Pieces) -> list[Joined]:
    """The weight of 8-bit rows."""
    if pieces.has(".weight_format") and pieces.array(".weight_format", ("U8",)).any():
        raise pieces.wrong(".weight_format", "is of a layout for one kind of GPU, not of rows")
    codes = pieces.array(".weight", ("I8",), (None, None))
    num_rows, num_columns = codes.shape
    largest = pieces.array(".SCB", ("F32",), (num_rows,))
    read = partial(_byte_rows, codes.view(np.uint8), largest)
    name, form = f"{pieces.name}.weight", CodeForm("int8", 0)
    return [CodedTensor(name, form, (num_rows, num_columns), pieces.num_bytes, read)]


def _byte_rows(codes: U8, largest: F32, first: int, last: int) -> CodeRows:
    return CodeRows(codes[first:last], largest[first:last, None] / np.float32(127))

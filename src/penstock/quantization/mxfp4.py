"""MXFP4 checkpoints of GPT-OSS, and its experts in whatever precision.

Knows how GPT-OSS stores the experts of a layer in one tensor each (OpenAI's gpt-oss and
transformers' `integrations/mxfp4.py`): `gate_up_proj_blocks` U8 [E, 2 N, K / 32, 16] with
`gate_up_proj_scales` U8 [E, 2 N, K / 32], two codes of e2m1 to a byte, the first in the lower half,
and scales of e8m0 (OCP Microscaling Formats, 2023); `gate_up_proj_bias` [E, 2 N]; `down_proj`
likewise. The rows of gate and up take turns. Unquantized: `gate_up_proj` [E, K, 2 N], `down_proj`
[E, N, K]. Here they become one linear map for each expert and projection, named as in other models
with experts.

Invariant: values are exact in float32. No more than one projection of one expert is copied at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from penstock.quantization.codes import (
    U8,
    CodedTensor,
    CodeForm,
    CodeRows,
    CutTensor,
    StoredTensor,
)
from penstock.quantization.modules import Keys, Listed
from penstock.quantization.pieces import (
    FLOATS,
    Joined,
    Pieces,
    Suffixes,
    array_of,
    check_parts,
    damaged,
    join_pieces,
    nibbles,
    powers_of,
)

FORM = CodeForm("fp4", 32)
_GROUP = 32
MAX_EXPERTS = 4096  # of a layer
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_PROJECTIONS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_SUFFIXES = Suffixes(leads=(_BLOCKS,), others=(_SCALES,))
_EXPERT = re.compile(r"(.*\.experts)\.[0-9]+\.(gate|up|down)_proj")


class Mxfp4:
    """A checkpoint in this format, from its `quantization_config`."""

    name = "MXFP4 experts"
    activation_bits = 16

    def __init__(self, keys: Keys) -> None:
        key = "modules_to_not_convert"
        self._skipped = Listed(keys.names(key) or [], keys.prefix + key)

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of a weight by its name; None: it is stored plainly."""
        found = _EXPERT.fullmatch(name.removesuffix(".weight"))
        return FORM if found and not self._skipped.has(found[1]) else None

    def join(self, tensors: Sequence[StoredTensor]) -> list[Joined]:
        """See `penstock.quantization.stored.StoredPrecision`."""
        joined: list[Joined] = []
        for part in join_pieces(tensors, _SUFFIXES, _made):
            joined += split_experts([part]) if isinstance(part, StoredTensor) else [part]
            check_parts(len(joined))
        return joined


def split_experts(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor | CutTensor]:
    """The tensors, where those that hold all experts of a GPT-OSS layer are one for each expert.

    "model.layers.0.mlp.experts.gate_up_proj" gives "....experts.0.gate_proj.weight" [N, K],
    "....experts.0.up_proj.weight" and so on; biases likewise. Nothing is copied yet.

    Raises:
        ModelLoadError: a tensor of experts has a type or a shape that it cannot have.
    """
    for tensor in tensors:
        kind = _kind(tensor)
        if kind is None:
            yield tensor
            continue
        projections, is_bias, prefix = kind
        numbers = _numbers_of(tensor)
        for expert in range(len(numbers)):
            for index, projection in enumerate(projections):
                rows = numbers[expert, ..., index :: len(projections)].T
                name = _name(prefix, expert, projection, is_bias)
                yield CutTensor(name, tensor.dtype, rows.shape, rows)


def _kind(tensor: StoredTensor) -> tuple[tuple[str, ...], bool, str] | None:
    """Projections of a tensor of experts, whether it is a bias, and what its name starts with."""
    name = tensor.name.removesuffix(_BIAS)
    split = _split(name)
    return None if split is None else (split[0], name != tensor.name, split[1])


def _split(name: str) -> tuple[tuple[str, ...], str] | None:
    """Projections of a map of all experts, and its name up to "experts"."""
    prefix, _, last = name.rpartition(".")
    if prefix.rpartition(".")[2] != "experts" or last not in _PROJECTIONS:
        return None
    return _PROJECTIONS[last], prefix


def _numbers_of(tensor: StoredTensor) -> NDArray[Any]:
    """A tensor of experts as an array, checked."""
    numbers = array_of(tensor, FLOATS, [None] * (2 if tensor.name.endswith(_BIAS) else 3))
    if "gate_up_proj" in tensor.name and tensor.shape[-1] % 2:
        raise damaged(tensor, f"has shape {list(tensor.shape)}, which gate and up cannot share")
    if len(numbers) > MAX_EXPERTS:
        raise damaged(tensor, f"has `{len(numbers)}` experts, more than `{MAX_EXPERTS}`")
    return numbers


def _name(prefix: str, expert: int, projection: str, is_bias: bool) -> str:
    return f"{prefix}.{expert}.{projection}_proj.{'bias' if is_bias else 'weight'}"


def _made(pieces: Pieces) -> list[Joined]:
    """The weights of all experts of a layer, of one projection or of gate and up."""
    blocks = pieces.array(_BLOCKS, ("U8",), (None, None, None, _GROUP // 2))
    num_experts, num_rows, num_groups, _ = blocks.shape
    scales = pieces.array(_SCALES, ("U8",), (num_experts, num_rows, num_groups))
    split = _split(pieces.name)
    if split is None:
        raise pieces.wrong(_BLOCKS, "is neither of `gate_up_proj` nor of `down_proj` of experts")
    projections, prefix = split
    if num_rows % len(projections):
        raise pieces.wrong(_BLOCKS, f"has `{num_rows}` rows, which gate and up cannot share")
    shape = (num_rows // len(projections), num_groups * _GROUP)
    if num_experts > MAX_EXPERTS:
        raise pieces.wrong(_BLOCKS, f"has `{num_experts}` experts, more than `{MAX_EXPERTS}`")
    num_bytes = pieces.num_bytes // (num_experts * len(projections))
    made: list[Joined] = []
    for expert in range(num_experts):
        for index, projection in enumerate(projections):
            some = slice(index, None, len(projections))
            read = partial(
                _rows, f"{pieces.name}{_SCALES}", blocks[expert, some], scales[expert, some]
            )
            name = _name(prefix, expert, projection, is_bias=False)
            made.append(CodedTensor(name, FORM, shape, num_bytes, read))
    return made


def _rows(name: str, blocks: NDArray[Any], scales: NDArray[Any], first: int, last: int) -> CodeRows:
    """Rows [first, last) of one weight."""
    some = blocks[first:last]
    octets: U8 = some.reshape(len(some), some.shape[1] * some.shape[2])
    return CodeRows(nibbles(octets, 2 * octets.shape[1]), powers_of(scales[first:last], name))

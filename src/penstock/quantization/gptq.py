"""GPTQ checkpoints: integers of 4 or 8 bits, packed along the columns of the weight.

Knows the layout that AutoGPTQ writes and GPTQModel and transformers read
(https://github.com/AutoGPTQ/AutoGPTQ, `QuantLinear.pack`; the method is Frantar et al. 2022). For a
weight [N, K] in groups of G columns: `qweight` int32 [K * bits / 32, N], `qzeros` int32
[K / G, N * bits / 32], `scales` [K / G, N], `g_idx` int32 [K] perhaps. Value = scale * (code -
zero), where the zero point is stored less one ("gptq") or as it is ("gptq_v2").

Invariant: what is decoded is what was asked for; a matrix is never held in float32. With scales of
16 bits the values are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import U8, CodedTensor, CodeForm, CodeRows, StoredTensor
from penstock.quantization.modules import Keys, Listed, is_in_block, last_part
from penstock.quantization.patterns import Patterns
from penstock.quantization.pieces import (
    FLOATS,
    Joined,
    Pieces,
    Suffixes,
    floats_of,
    join_pieces,
    minima_of,
    nibbles,
    told,
)

_SUFFIXES = Suffixes((".qweight",), (".qzeros", ".scales", ".g_idx"))


@dataclass(frozen=True, slots=True)
class Settings:
    """What the codes of a module are."""

    bits: int
    group_size: int  # 0: the whole row
    is_symmetric: bool

    @property
    def form(self) -> CodeForm:
        """Without minima if every zero point is the middle."""
        if self.is_symmetric:
            return CodeForm("int4" if self.bits == 4 else "int8", self.group_size)
        return CodeForm("uint4" if self.bits == 4 else "uint8", self.group_size, has_minima=True)


class Gptq:
    """A checkpoint in this format, from its `quantization_config`."""

    activation_bits = 16

    def __init__(self, keys: Keys) -> None:
        keys.refuse("is_marlin_format", "rotation", "adapter")
        keys.choice("pack_dtype", ("int32",), "int32")
        version = "checkpoint_format" if keys.config.get("checkpoint_format") else "format"
        self._zero_offset = int(keys.choice(version, ("gptq", "gptq_v2"), "gptq") == "gptq")
        self._settings = _settings(keys, None)
        self._has_head = keys.flag("lm_head", False)
        self._skipped = Listed(
            keys.names("modules_to_not_convert") or [], f"{keys.prefix}modules_to_not_convert"
        )
        self._within = _within(keys)
        self._dynamic, self._exceptions = _dynamic(keys, self._settings)
        group_size, bits = self._settings.group_size, self._settings.bits
        groups = f"groups of {group_size}" if group_size else "whole rows"
        self.name = f"GPTQ, {bits} bits in {groups}"

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of a weight by its name; None: it is stored plainly."""
        settings = self._of(name.removesuffix(".weight"))
        return None if settings is None else settings.form

    def join(self, tensors: Sequence[StoredTensor]) -> list[Joined]:
        """See `penstock.quantization.stored.StoredPrecision`."""
        return join_pieces(tensors, _SUFFIXES, self._made)

    def _of(self, module: str) -> Settings | None:
        """None: the module is not coded."""
        is_meant = is_in_block(module) or (self._has_head and last_part(module) == "lm_head")
        if not is_meant or self._skipped.has(module):
            return None
        if self._within is not None and not self._within.has(module):
            return None
        exception = self._dynamic.first(module)
        return self._settings if exception is None else self._exceptions[exception]

    def _made(self, pieces: Pieces) -> list[Joined]:
        settings = self._of(pieces.name) or self._settings
        packed = pieces.array(".qweight", ("I32",), (None, None))
        per_word = 32 // settings.bits
        num_rows, num_columns = packed.shape[1], packed.shape[0] * per_word
        group_size = settings.group_size or num_columns
        num_groups = -(-num_columns // group_size)
        scales = pieces.array(".scales", FLOATS, (num_groups, num_rows))
        zeros = pieces.array(".qzeros", ("I32",), (num_groups, -(-num_rows // per_word)))
        if pieces.has(".g_idx"):
            _check_order(pieces, num_columns, group_size)
        read = partial(_rows, pieces.name, settings, self._zero_offset, packed, zeros, scales)
        shape = (num_rows, num_columns)
        name = f"{pieces.name}.weight"
        return [CodedTensor(name, settings.form, shape, pieces.num_bytes, read)]


def _settings(keys: Keys, base: Settings | None) -> Settings:
    """Of all modules; or of some, where the keys may be absent."""
    return Settings(
        keys.choice("bits", (4, 8), base.bits if base else None),
        keys.group_size("group_size", (base.group_size or -1) if base else None),
        keys.flag("sym", base.is_symmetric if base else True),
    )


def _within(keys: Keys) -> Listed | None:
    """The only modules of a block that are quantized, if the config names them."""
    key = "modules_in_block_to_quantize"
    value = keys.config.get(key)
    if value is None:
        return None
    flat = [name for entry in value for name in (entry if isinstance(entry, list) else [entry])] \
        if isinstance(value, list) else value  # fmt: skip
    found = Keys({key: flat}, keys.prefix)
    return Listed(found.names(key) or [], keys.prefix + key)


def _dynamic(keys: Keys, base: Settings) -> tuple[Patterns, list[Settings | None]]:
    """GPTQModel's exceptions, which patterns name; None where the module is not quantized."""
    part = keys.part("dynamic")
    rules = part.config if part else {}
    patterns: list[str] = []
    exceptions: list[Settings | None] = []
    for rule in rules:
        if part is None or not isinstance(rule, str):
            raise keys.error("dynamic", "an object of patterns")
        patterns.append(rule.removeprefix("+:").removeprefix("-:"))
        settings = None if rule.startswith("-:") else part.part(rule)
        exceptions.append(None if settings is None else _settings(settings, base))
    return Patterns(patterns, f"{keys.prefix}dynamic"), exceptions


def _check_order(pieces: Pieces, num_columns: int, group_size: int) -> None:
    """Refuse columns whose groups are not runs of them: a group has one scale here."""
    groups = pieces.array(".g_idx", ("I32",), (num_columns,))
    if not np.array_equal(groups, np.arange(num_columns) // group_size):
        raise UnsupportedModel(
            f"`quantization_config.desc_act` has put the columns of `{told(pieces.name)}` into "
            "groups by activation, which is not implemented.",
            hint="use a checkpoint that was made with `desc_act` false or `static_groups` true.",
        )


def _rows(
    name: str,
    settings: Settings,
    zero_offset: int,
    packed: NDArray[np.int32],
    zeros: NDArray[np.int32],
    scales: NDArray[Any],
    first: int,
    last: int,
) -> CodeRows:
    """Rows [first, last) of the weight: columns of what is stored."""
    middle = 1 << (settings.bits - 1)
    words = packed[:, first:last].T.copy()  # never a view: it is changed
    octets = words.view(np.uint8)
    if settings.is_symmetric:  # a code less the middle, in two's complement
        octets ^= 0x88 if settings.bits == 4 else 0x80
    codes = nibbles(octets, 2 * octets.shape[1]) if settings.bits == 4 else octets
    factors = np.ascontiguousarray(floats_of(scales[:, first:last]).T)
    offsets = _zero_points(settings.bits, zero_offset, zeros, first, last)
    if not settings.is_symmetric:
        return CodeRows(codes, factors, minima_of(factors, offsets))
    if (offsets != middle).any():
        raise ModelLoadError(
            f"`{told(name)}.qzeros` has zero points other than `{middle}`, where "
            "`quantization_config.sym` is true in the model's config.",
            hint="if the checkpoint is asymmetric, its config must say `sym` false.",
        )
    return CodeRows(codes, factors)


def _zero_points(bits: int, offset: int, zeros: NDArray[np.int32], first: int, last: int) -> U8:
    """Zero points [n, groups] of rows, which are packed along the rows."""
    per_word = 32 // bits
    start = first // per_word
    words = np.ascontiguousarray(zeros[:, start : -(-last // per_word)]).view(np.uint8)
    unpacked = nibbles(words, 2 * words.shape[1]) if bits == 4 else words
    wanted = unpacked[:, first - start * per_word : last - start * per_word].T
    return (wanted + np.uint8(offset)) & np.uint8(2**bits - 1)

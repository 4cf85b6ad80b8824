"""Safetensors files: their headers read and checked, their numbers mapped.

Owns the format (https://github.com/huggingface/safetensors): eight bytes of length, a JSON object
of that length that gives each tensor a dtype, a shape and a range of bytes, then the bytes. Knows
no model. The header comes from a stranger: no length or offset in it is used before it was checked
against the size of the file.

Invariant: the tensors of a file that is accepted lie one after the other, without gap or overlap,
from the end of the header to the end of the file, and each is as long as its shape and dtype say.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from penstock.errors import ModelLoadError
from penstock.gguf.reader import map_file
from penstock.quantization.codes import Found, StoredTensor

MAX_HEADER_BYTES = 100_000_000  # as the format's own library has it
MAX_DIMS = 8
MAX_SIZE = 2**63 - 1
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_NUMBER_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bytes of a number. A dtype that is not here is passed on unchecked: nobody reads such a tensor.
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


class _Entry(NamedTuple):
    """What the header says of one tensor; start and stop count from the end of the header."""

    start: int
    stop: int
    name: str
    dtype: str
    shape: tuple[int, ...]


class _Damaged(Exception):
    """What is wrong with a file, without its name."""


def map_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a file in the order of their bytes, which are mapped and not read.

    The mapping lives as long as an array of it does.

    Raises:
        ModelLoadError: the file cannot be opened, or it is not a whole safetensors file.
    """
    try:
        if stat.S_ISFIFO(file.stat().st_mode):
            raise _Damaged("it is a pipe")  # to open it would wait for who writes
        with file.open("rb") as opened:
            num_bytes = opened.seek(0, 2)
            if num_bytes < _LENGTH_BYTES:
                raise _Damaged(f"it has `{num_bytes}` bytes, too few for a header")
            mapped = map_file(opened, num_bytes)
        data = np.frombuffer(mapped, np.uint8)
        header_bytes = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
        first = _LENGTH_BYTES + header_bytes
        if header_bytes > MAX_HEADER_BYTES or first > num_bytes:
            raise _Damaged(
                f"its header is said to be `{header_bytes}` bytes long, in a file of `{num_bytes}`"
            )
        entries = _read_header(data[_LENGTH_BYTES:first].tobytes(), num_bytes - first)
    except (_Damaged, OSError) as error:
        hint = "the file is damaged or incomplete; download it again."
        if isinstance(error, PermissionError):
            hint = "the user that runs this may not read it; `ls -l` shows who may."
        raise ModelLoadError(f"`{file}` cannot be read: {error}.", hint=hint) from error
    body = data[first:]
    return [
        StoredTensor(entry.name, entry.dtype, entry.shape, body[entry.start : entry.stop], True)
        for entry in entries
    ]


def number_type(file: Path) -> str | None:
    """The type of a file's first matrix of plain numbers, as configs call it; None: it has none.

    Raises:
        ModelLoadError: as `map_tensors`.
    """
    for tensor in map_tensors(file):
        if tensor.dtype in _NUMBER_TYPES and len(tensor.shape) > 1:
            return _NUMBER_TYPES[tensor.dtype]
    return None


def in_turn(tensors: Sequence[Found]) -> Iterator[Found]:
    """Mapped tensors, one after the other, for whoever is done with each when it asks for the next.

    The next one is on its way from the disk while one is used, and the memory of those before it
    is given back: what is still needed of them would be read again.
    """
    for tensor, following in zip(tensors, [*tensors[1:], None], strict=True):
        if following is not None:
            _advise(following, "MADV_WILLNEED")
        yield tensor
        _advise(tensor, "MADV_DONTNEED")


def _advise(tensor: Found, advice: str) -> None:
    """Tell the system about the pages of a tensor that is mapped and was never written to."""
    if not isinstance(tensor, StoredTensor) or not tensor.is_mapped:
        return  # other memory would lose what it holds
    if hasattr(mmap, advice) and tensor.data.size:
        into_page = tensor.data.ctypes.data % mmap.PAGESIZE
        start = ctypes.c_void_p(tensor.data.ctypes.data - into_page)
        num_bytes = ctypes.c_size_t(tensor.data.nbytes + into_page)
        ctypes.CDLL(None).madvise(start, num_bytes, getattr(mmap, advice))  # only ever an advice


def _read_header(text: bytes, body_bytes: int) -> list[_Entry]:
    """The checked entries of a header, by offset; `body_bytes` follow it in the file."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = str(error).encode("ascii", "backslashreplace").decode()[:200]
        raise _Damaged(f"its header is not JSON: {reason}") from error
    if not isinstance(header, dict):
        raise _Damaged("its header is not a JSON object")
    header.pop(_METADATA, None)
    entries = sorted(_entry(name, told) for name, told in header.items())
    end = 0
    for entry in entries:
        if entry.start != end:
            raise _Damaged(
                f"`{shown(entry.name)}` starts at byte `{entry.start}` of its data, where the "
                f"tensors before it end at `{end}`"
            )
        end = entry.stop
        if end > body_bytes:
            raise _Damaged(
                f"`{shown(entry.name)}` ends at byte `{end}` of its data, which has `{body_bytes}`"
            )
    if end != body_bytes:
        raise _Damaged(f"its tensors end at byte `{end}` of its data, which has `{body_bytes}`")
    return entries


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is there twice could mean either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Damaged(f"its header has `{shown(name)}` twice")
            seen.add(name)
    return found


def _entry(name: str, told: Any) -> _Entry:
    """One tensor, as the header has it."""
    if not isinstance(told, dict):
        raise _Damaged(f"`{shown(name)}` is not described by a JSON object")
    dtype: Any = told.get("dtype")
    shape: Any = told.get("shape")
    offsets: Any = told.get("data_offsets")
    if not isinstance(dtype, str):
        raise _Damaged(f"`{shown(name)}` has no `dtype`")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise _Damaged(f"`{shown(name)}` has no `shape` of at most `{MAX_DIMS}` sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Damaged(f"`{shown(name)}` has no `data_offsets` of a start and an end")
    start, stop = offsets
    if dtype in _ITEM_BYTES and stop - start != (size := math.prod(shape) * _ITEM_BYTES[dtype]):
        raise _Damaged(
            f"`{shown(name)}`, {dtype} of shape {shape}, takes `{size}` bytes; its "
            f"`data_offsets` give it `{stop - start}`"
        )
    return _Entry(start, stop, name, dtype, tuple(shape))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= MAX_SIZE for size in value
    )


def shown(text: str) -> str:
    """A stranger's text as an error message can print it."""
    return ascii(text)[1:-1][:100]

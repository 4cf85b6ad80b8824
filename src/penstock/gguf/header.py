"""The header of a GGUF file, read as what it is: bytes of a stranger.

Owns the layout of the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic,
version, two counts, keys with values, then a name, sizes, a type and an offset for each tensor.
Knows nothing of what the keys mean but `general.alignment`.

Invariant: no count, length, size or offset is used before it was compared with the bytes that
there are, and all of them together are bounded: whatever the bytes, reading them takes less than
two seconds and some hundred megabytes. All arithmetic is Python's, which does not overflow.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from penstock.gguf.types import TENSOR_TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000  # ten times what the largest published vocabulary takes
MAX_KEYS = 2**16
MAX_TENSORS = 2**16
MAX_STRINGS = 2**21  # in arrays, together; 262,144 tokens with their merges are 0.8 million
MAX_ARRAYS = 2**16  # in arrays, together
MAX_DIMS = 4
MAX_DEPTH = 2  # of arrays in arrays
MAX_ALIGNMENT = 2**16
DEFAULT_ALIGNMENT = 32
ALIGNMENT = "general.alignment"
_FIXED_BYTES = 24
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {  # by type of a value
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_DTYPES = {code: np.dtype(name) for code, name in _NUMBERS.items()}
_LENGTH = struct.Struct("<Q")
_CHUNK_BYTES = 2**20


class Damaged(Exception):
    """What is wrong with a file, without its name."""


class Entry(NamedTuple):
    """What the header says of one tensor; start and stop count from the start of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # row-major: the last size is that of a row
    start: int
    stop: int


class Header(NamedTuple):
    """Everything in front of the data."""

    metadata: dict[str, Any]
    entries: list[Entry]  # by start


def shown(text: str) -> str:
    """A stranger's text as an error message can print it."""
    return ascii(text)[1:-1][:100]


def read_header(data: memoryview, num_bytes: int) -> Header:
    """Read and check a header.

    Args:
        data: the file's bytes from the start, at least as far as the header may reach.
        num_bytes: of the whole file.

    Raises:
        Damaged: they are no whole GGUF file.
    """
    cursor = _Cursor(data[:MAX_HEADER_BYTES])
    if num_bytes < _FIXED_BYTES or bytes(data[:4]) != MAGIC:
        raise Damaged("it does not begin as a GGUF file does")
    cursor.skip(4)
    version = cursor.integer(4)
    if version & 0xFFFF == 0 and version:
        raise Damaged("its numbers are big-endian, which is not read")
    if version not in VERSIONS:
        raise Damaged(f"its version is `{version}`; versions `2` and `3` are read")
    num_tensors = _count(cursor.integer(8), MAX_TENSORS, "tensors")
    num_keys = _count(cursor.integer(8), MAX_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        cursor.about = "a key"
        key = cursor.string()
        cursor.about = f"`{shown(key)}`"
        if key in metadata:
            raise Damaged(f"it has `{shown(key)}` twice")
        metadata[key] = cursor.value(cursor.integer(4))
    told = [_told(cursor) for _ in range(num_tensors)]
    start = _aligned(cursor.position, alignment := _alignment(metadata))
    return Header(metadata, _entries(told, start, alignment, num_bytes))


class _Told(NamedTuple):
    """One tensor as the header has it."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int  # from the start of the data


def _count(number: int, most: int, what: str) -> int:
    if number > most:
        raise Damaged(f"it is said to have `{number}` {what}; at most `{most}` are read")
    return number


def _alignment(metadata: dict[str, Any]) -> int:
    number = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if type(number) is not int or not 8 <= number <= MAX_ALIGNMENT or number & (number - 1):
        raise Damaged(
            f"`{ALIGNMENT}` is `{shown(str(number))}`; it must be a power of two from `8` to "
            f"`{MAX_ALIGNMENT}`"
        )
    return number


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _told(cursor: _Cursor) -> _Told:
    cursor.about = "the name of a tensor"
    name = cursor.string()
    cursor.about = f"`{shown(name)}`"
    num_dims = cursor.integer(4)
    if not 1 <= num_dims <= MAX_DIMS:
        raise Damaged(f"{cursor.about} has `{num_dims}` dimensions; `1` to `{MAX_DIMS}` can be")
    sizes = [cursor.integer(8) for _ in range(num_dims)]
    number = cursor.integer(4)
    if number not in TENSOR_TYPES:
        raise Damaged(f"{cursor.about} is of type `{number}`, which is not known")
    return _Told(name, TENSOR_TYPES[number], tuple(reversed(sizes)), cursor.integer(8))


def _entries(told: list[_Told], start: int, alignment: int, num_bytes: int) -> list[Entry]:
    """The tensors by offset: each in the file, none twice, none over another."""
    names: set[str] = set()
    entries: list[Entry] = []
    end, last = 0, ""
    for tensor in sorted(told, key=lambda tensor: tensor.offset):
        about = f"`{shown(tensor.name)}`"
        if tensor.name in names:
            raise Damaged(f"it has {about} twice")
        names.add(tensor.name)
        if min(tensor.shape) == 0 or tensor.shape[-1] % tensor.type.block_size:
            raise Damaged(
                f"{about} is of shape `{tensor.shape}`; rows of {tensor.type.name} have a multiple "
                f"of `{tensor.type.block_size}` numbers, and no size is `0`"
            )
        stop = tensor.offset + math.prod(tensor.shape[:-1]) * tensor.type.row_bytes(
            tensor.shape[-1]
        )
        if tensor.offset % alignment:
            raise Damaged(f"{about} starts at `{tensor.offset}`, no multiple of `{alignment}`")
        if tensor.offset < end:
            raise Damaged(f"{about} starts at `{tensor.offset}`, inside of `{shown(last)}`")
        if start + stop > num_bytes:
            raise Damaged(f"{about} ends at byte `{start + stop}` of a file of `{num_bytes}` bytes")
        end, last = stop, tensor.name
        entries.append(
            Entry(tensor.name, tensor.type, tensor.shape, start + tensor.offset, start + stop)
        )
    return entries


class _Cursor:
    """Reads forward through the header; `about` says what, for errors."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._left = {_STRING: MAX_STRINGS, _ARRAY: MAX_ARRAYS}
        self.position = 0
        self.about = "the header"

    def skip(self, num_bytes: int) -> int:
        """Step over so many bytes, which must be there; where they start."""
        first = self.position
        if num_bytes > len(self._data) - first:
            raise Damaged(
                f"{self.about} takes `{num_bytes}` bytes at byte `{first}`, where "
                f"`{len(self._data) - first}` are left for the header"
            )
        self.position += num_bytes
        return first

    def integer(self, num_bytes: int) -> int:
        """An unsigned integer."""
        first = self.skip(num_bytes)
        return int.from_bytes(self._data[first : first + num_bytes], "little")

    def string(self) -> str:
        """A length and as many bytes of UTF-8."""
        length = self.integer(8)
        first = self.skip(length)
        return self._decoded(first, first + length)

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value: number, string, array of numbers (ndarray) or of anything else (list)."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(depth)
        numbers = self._numbers(kind, 1)
        return bool(numbers[0]) if kind == _BOOL else numbers[0].item()

    def _array(self, depth: int) -> Any:
        kind = self.integer(4)
        count = self.integer(8)
        if kind not in {_STRING, _ARRAY}:
            numbers = self._numbers(kind, count)
            return numbers.astype(np.bool_) if kind == _BOOL else numbers
        if depth == MAX_DEPTH:
            raise Damaged(f"{self.about} has arrays in arrays, more than `{MAX_DEPTH}` deep")
        self._left[kind] -= count
        if self._left[kind] < 0:
            raise Damaged(
                f"{self.about} is said to have `{count}` entries; at most `{MAX_STRINGS}` strings "
                f"and `{MAX_ARRAYS}` arrays are read"
            )
        if kind == _STRING:
            return self._strings(count)
        return [self._array(depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray[Any, np.dtype[Any]]:
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise Damaged(f"{self.about} has a value of type `{kind}`, which is not known")
        first = self.skip(count * dtype.itemsize)
        numbers = np.frombuffer(self._data, dtype, count, first)
        if kind == _BOOL and (numbers > 1).any():
            raise Damaged(f"{self.about} is neither true nor false")
        return numbers.copy()  # what the header says outlives the mapping of the file

    def _strings(self, count: int) -> list[str]:
        """As `string`, many times: written out, because there can be a million of them."""
        unpack = _LENGTH.unpack_from
        strings: list[str] = []
        chunk, at = b"", 0  # bytes from `position` on, and how many of them are done
        try:
            for _ in range(count):
                if at + 8 > len(chunk):
                    chunk, at = self._chunk(at, 8), 0
                (length,) = unpack(chunk, at)
                stop = at + 8 + length
                if stop > len(chunk):
                    chunk, at = self._chunk(at, 8 + length), 0
                    stop = 8 + length
                strings.append(chunk[at + 8 : stop].decode())
                at = stop
        except UnicodeDecodeError as error:
            raise Damaged(f"{self.about} is not UTF-8: {error.reason}") from error
        self.position += at
        return strings

    def _chunk(self, num_done: int, num_bytes: int) -> bytes:
        """Step over what is done; the bytes that follow, at least so many."""
        self.position += num_done
        first = self.position
        self.skip(num_bytes)  # they must be there
        self.position = first
        return bytes(self._data[first : first + max(num_bytes, _CHUNK_BYTES)])

    def _decoded(self, first: int, stop: int) -> str:
        try:
            return str(self._data[first:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise Damaged(f"{self.about} is not UTF-8: {error.reason}") from error

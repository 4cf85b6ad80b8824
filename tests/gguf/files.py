"""GGUF files made by hand, byte by byte, so that they can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACKED = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B",
    U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def value(kind: int, content: Any) -> bytes:
    """The bytes of a value; of an array, `content` is (kind, entries) or (kind, entries, count)."""
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        inner, entries, *count = content
        head = struct.pack("<IQ", inner, count[0] if count else len(entries))
        return head + b"".join(value(inner, entry) for entry in entries)
    return struct.pack(PACKED[kind], content)


def key(name: str | bytes, kind: int, content: Any) -> bytes:
    return string(name) + struct.pack("<I", kind) + value(kind, content)


def info(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """What a header says of a tensor; `dims` in ggml's order, the row's first."""
    sizes = b"".join(struct.pack("<Q", dim) for dim in dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def gguf(
    keys: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file."""
    num_keys = len(keys) if num_keys is None else num_keys
    num_tensors = len(infos) if num_tensors is None else num_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    head += b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def write(directory: Path, content: bytes, name: str = "a.gguf") -> Path:
    file = directory / name
    file.write_bytes(content)
    return file


def small() -> bytes:
    """A file with one of everything."""
    keys = [
        key("general.architecture", STRING, "llama"),
        key("u8", U8, 7),
        key("f32", F32, 0.1),
        key("yes", BOOL, 1),
        key("i64", I64, -5),
        key("tokens", ARRAY, (STRING, ["a", "ключ", ""])),
        key("scores", ARRAY, (F32, [0.5, -1.0])),
        key("flags", ARRAY, (BOOL, [0, 1])),
        key("deep", ARRAY, (ARRAY, [(U16, [1, 2]), (U16, [])])),
    ]
    infos = [info("a.weight", [32, 2], 8), info("b.weight", [3], 0, 96)]
    return gguf(keys, infos, bytes(range(68)) + bytes(28) + struct.pack("<3f", 1, 2, 3))

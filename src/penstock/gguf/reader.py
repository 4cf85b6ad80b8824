"""GGUF files opened: metadata read, tensors mapped, the parts of a split file put together.

Owns which files belong together and what a tensor's bytes are. Knows no model and decodes no
numbers. Invariant: a tensor of a file that is accepted lies within the file, over no other tensor,
and is as long as its shape and type say; no name is there twice, in all parts together.
"""

from __future__ import annotations

import mmap
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.gguf.header import Damaged, read_header, shown

MAX_PARTS = 9999
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # which Python 3.11 has no name for
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFTensor(NamedTuple):
    """One tensor of a file."""

    name: str
    type_name: str  # ggml's: "F32", "Q4_K", ...
    shape: tuple[int, ...]  # row-major: [..., columns]
    data: NDArray[np.uint8]  # its bytes, 1-D; mapped: never to be written
    file: Path


class GGUFFile(NamedTuple):
    """A GGUF file, or all parts of one.

    Attributes:
        metadata: str, int, float or bool; of arrays, those of numbers are ndarrays, others lists.
        tensors: by file, in the order of their bytes.
        files: the parts, in order.
    """

    metadata: dict[str, Any]
    tensors: list[GGUFTensor]
    files: list[Path]


def is_gguf(path: Path) -> bool:
    """Whether this is meant to be a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_gguf(path: Path | str) -> GGUFFile:
    """Read the metadata of a file and map its tensors; of a split file, those of all parts.

    A mapping lives as long as an array of it does. Any part stands for the whole.

    Raises:
        ModelLoadError: a file is missing, damaged, big-endian, or of a version that is not read;
            or the parts do not belong together.
    """
    file = Path(path)
    match = _PART.fullmatch(file.name)
    if match is None:
        metadata, tensors = _open_one(file)
        if (count := _split(metadata, "split.count", file)) > 1:
            raise ModelLoadError(
                f"`{file}` is one of `{count}` parts (`split.count`), and not named like one.",
                hint="name the parts NAME-00001-of-00003.gguf and so on, in one directory.",
            )
        return GGUFFile(metadata, tensors, [file])
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        raise ModelLoadError(f"`{file}` is named as part `{match['number']}` of `{count}`.")
    names = (f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    return _joined([file.with_name(name) for name in names])


def _joined(files: list[Path]) -> GGUFFile:
    """All parts as one."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ModelLoadError(
            f"`{missing[0]}` is missing, one of the `{len(files)}` parts of a model.",
            hint="download all parts into one directory.",
        )
    metadata: dict[str, Any] = {}
    tensors: dict[str, GGUFTensor] = {}
    num_tensors = 0
    for number, file in enumerate(files):
        own, found = _open_one(file)
        for key, wanted in (("split.no", number), ("split.count", len(files))):
            if _split(own, key, file) != wanted:
                raise ModelLoadError(
                    f"`{key}` in `{file}` is `{shown(str(own.get(key)))}`; by its name it should "
                    f"be `{wanted}`."
                )
        if number == 0:
            metadata = own
            num_tensors = _split(own, "split.tensors.count", file)
        for tensor in found:
            if tensor.name in tensors:
                raise ModelLoadError(
                    f"`{file}` has `{shown(tensor.name)}`, which `{tensors[tensor.name].file}` "
                    "has too."
                )
            tensors[tensor.name] = tensor
    if num_tensors not in {0, len(tensors)}:
        raise ModelLoadError(
            f"`split.tensors.count` in `{files[0]}` is `{num_tensors}`; its `{len(files)}` parts "
            f"have `{len(tensors)}`."
        )
    return GGUFFile(metadata, list(tensors.values()), files)


def map_file(opened: BinaryIO, num_bytes: int) -> mmap.mmap:
    """The bytes of a file, which what is written to them does not change.

    Writable, so that torch takes a view of them without a copy or a warning. No memory is reserved
    for such writes: else Linux refuses to map a file that is larger than the machine's memory.

    Raises:
        OSError: it cannot be mapped.
    """
    return mmap.mmap(opened.fileno(), num_bytes, mmap.MAP_PRIVATE | _NO_RESERVE)


def _split(metadata: dict[str, Any], key: str, file: Path) -> int:
    """A number that only split files have; 0 where it is absent."""
    value = metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise ModelLoadError(f"`{key}` in `{file}` is `{shown(str(value))}`, no number of parts.")
    return value


def _open_one(file: Path) -> tuple[dict[str, Any], list[GGUFTensor]]:
    try:
        if stat.S_ISFIFO(file.stat().st_mode):
            raise Damaged("it is a pipe")  # to open it would wait for who writes
        with file.open("rb") as opened:
            num_bytes = opened.seek(0, 2)
            if num_bytes == 0:
                raise Damaged("it is empty")
            mapped = map_file(opened, num_bytes)
        header = read_header(memoryview(mapped), num_bytes)
    except (Damaged, OSError) as error:
        hint = "the file is damaged, incomplete or no GGUF file; download it again."
        if isinstance(error, PermissionError):
            hint = "the user that runs this may not read it; `ls -l` shows who may."
        raise ModelLoadError(f"`{file}` cannot be read: {error}.", hint=hint) from error
    data = np.frombuffer(mapped, np.uint8)
    return header.metadata, [
        GGUFTensor(entry.name, entry.type.name, entry.shape, data[entry.start : entry.stop], file)
        for entry in header.entries
    ]

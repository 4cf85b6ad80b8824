"""Quantized weights on disk as they lie in memory, so that a model is quantized once.

Owns the directory, the names and the format of its files, and what it takes to trust one. Knows
neither layers nor formats of numbers: the weights are one piece of memory here, and `Identity`
says what is in it.

A file is a head and the memory. The head, filled up to a multiple of `_PAGE`, is a magic, the
SHA-256 of the file's name, the size of the memory, a CRC-32 of each `_PIECE` of it, and a CRC-32
of all that. Invariant: what `read` accepts has the bytes that `write` was given under an equal
identity. The cache is never needed: what goes wrong with it is a warning in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from penstock.hardware import num_usable_cores

logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]

OFF = "off"
_SUFFIX = ".weights"
_INDEX = "checkpoints.json"
_MAGIC = b"penstkw1"
_PAGE = 4096
_PIECE = 2 * 2**20  # a huge page: threads that read never share one
_MAX_READERS = 16
_SETTLED_NS = 2 * 10**9  # a file changed later than that may change again within a tick
_ABANDONED_S = 3600.0  # a temporary file that old has no writer any more


class FileState(NamedTuple):
    """A file, and what is different once somebody has written to it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The file as it is now.

        Raises:
            OSError: there is none.
        """
        path = path.absolute()  # a link that points elsewhere now is another file, by its inode
        stat = path.stat()
        return cls(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Identity(NamedTuple):
    """What a piece of memory holds: numbers of a checkpoint, in some formats and places."""

    form: str  # the formats of the matrices; letters of file names
    layout: str  # a digest, in hex, of all else that decides which byte lies where
    files: tuple[FileState, ...]  # the checkpoint's, as they were before they were read


class _Unusable(Exception):
    """What is wrong with a file of the cache."""


def directory_of(setting: str | None) -> Path | None:
    """The directory that `--weight-cache` means; None: no cache.

    By default `weights` in $PENSTOCK_CACHE, $XDG_CACHE_HOME/penstock or ~/.cache/penstock; where
    $XDG_CACHE_HOME is relative, none, because its specification calls that invalid.
    """
    if setting == OFF:
        return None
    if setting:
        return Path(setting).expanduser().absolute()
    if root := os.environ.get("PENSTOCK_CACHE"):
        return Path(root).expanduser().absolute() / "weights"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # An account without a home would get a directory that is called `~`.
    return Path(caches, "penstock/weights") if os.path.isabs(caches) else None


class WeightCache:
    """The files of one directory. Any number of processes may use it at the same time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, identity: Identity, memory: Bytes) -> bool:
        """Fill `memory` [N] with what was written under this identity; False: with zeros."""
        try:
            # Nothing to find: then the checkpoint is not read through only to know its name.
            if not any(self.directory.glob(f"{identity.form}-{identity.layout}-*{_SUFFIX}")):
                return False
            path = self._path(identity)
            with open(path, "rb", buffering=0) as file:
                _read(file.fileno(), path.name, memory)
        except FileNotFoundError:
            return False
        except _Unusable as problem:
            logger.warning("`%s` is not used, and written anew: %s.", path, problem)
        except OSError as error:
            logger.warning("The weight cache cannot be read: %s.", error)
        else:
            return True
        memory.fill(0)
        return False

    def write(self, identity: Identity, memory: Bytes) -> None:
        """Keep `memory` [N] under this identity, if nobody has changed the checkpoint since."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._path(identity)
            with _replacing(path) as file:
                _write(file, path.name, memory)
                for state in identity.files:  # the index knew it, or it changed behind the digest
                    _check_unchanged(state)
            content = path.stem.rpartition("-")[2]
            for other in self.directory.glob(f"{identity.form}-*-{content}{_SUFFIX}"):
                if other != path:  # of a version of the library that is not used here any more
                    other.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("The weights are not kept for the next start: %s.", error)

    def write_behind(self, identity: Identity, memory: Bytes) -> threading.Thread:
        """`write` in a thread that gives way to others. `memory` must not change any more.

        An interpreter that ends waits for it. A process that is ended otherwise leaves what it has
        written under the name of a temporary file, which some later `write` removes.
        """

        def work() -> None:
            with contextlib.suppress(OSError, AttributeError):  # on Linux of this thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            self.write(identity, memory)

        thread = threading.Thread(target=work, name="weight-cache")
        thread.start()
        return thread

    def _path(self, identity: Identity) -> Path:
        content = self._content(identity.files)
        return self.directory / f"{identity.form}-{identity.layout}-{content}{_SUFFIX}"

    def _content(self, files: Iterable[FileState]) -> str:
        """A digest of what is in the files. A file that is as it was is not read again.

        Raises:
            OSError: a file cannot be read, or it changes meanwhile.
        """
        known = {tuple(state): str(digest) for *state, digest in self._index()}
        digests = []
        for state in files:
            digest = known.get(state)
            if digest is None:
                digest = _sha256(state)
                if time.time_ns() - state.mtime_ns > _SETTLED_NS:
                    with contextlib.suppress(OSError):  # it can be read all the same
                        self._remember(state, digest)
            digests.append(digest)
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]

    def _index(self) -> list[list[str | int]]:
        """Known files: the fields of each one's state and its digest."""
        try:
            index = json.loads((self.directory / _INDEX).read_bytes())
        except (OSError, ValueError, RecursionError):
            return []
        right = [str, int, int, int, int, str]
        return [
            entry
            for entry in (index if isinstance(index, list) else [])
            if isinstance(entry, list) and [type(field) for field in entry] == right
        ]

    def _remember(self, state: FileState, digest: str) -> None:
        """Another process may write the index at the same time; then one of both is forgotten."""
        if self.directory.is_dir():
            others = [entry for entry in self._index() if entry[0] != state.path]
            with _replacing(self.directory / _INDEX) as file:
                file.write(json.dumps([*others, [*state, digest]]).encode())


def _sha256(state: FileState) -> str:
    with open(state.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _check_unchanged(state)
    return digest


def _check_unchanged(state: FileState) -> None:
    if FileState.of(Path(state.path)) != state:
        raise OSError(f"`{state.path}` has been changed meanwhile")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at once, if all goes well; for its owner alone."""
    for old in path.parent.glob(".*.unfinished"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _ABANDONED_S:
                old.unlink()
    unfinished = path.parent / f".{path.name}.{os.getpid()}-{threading.get_native_id()}.unfinished"
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _head_bytes(num_bytes: int) -> int:
    """Bytes of the head of a file that holds so many."""
    num_pieces = -(-num_bytes // _PIECE)
    return -(-(len(_MAGIC) + 32 + 8 + 4 * num_pieces + 4) // _PAGE) * _PAGE


def _facts(name: str, num_bytes: int) -> bytes:
    """How the head of a file begins that has this name and holds so many bytes."""
    return _MAGIC + hashlib.sha256(name.encode()).digest() + num_bytes.to_bytes(8, "little")


def _write(file: BinaryIO, name: str, memory: Bytes) -> None:
    head_bytes = _head_bytes(len(memory))
    if hasattr(os, "posix_fallocate"):  # a disk that is too full says so at once
        os.posix_fallocate(file.fileno(), 0, head_bytes + len(memory))
    file.seek(head_bytes)
    sums = []
    for start in range(0, len(memory), _PIECE):
        piece = memory.data[start : start + _PIECE]
        sums.append(zlib.crc32(piece))
        file.write(piece)
    head = _facts(name, len(memory)) + np.array(sums, "<u4").tobytes()
    file.seek(0)
    file.write(head + zlib.crc32(head).to_bytes(4, "little"))


def _read(fd: int, name: str, memory: Bytes) -> None:
    """Fill `memory` from a file.

    Raises:
        _Unusable: the file does not hold what it should; the memory may hold anything.
        OSError: it cannot be read.
    """
    stat, head_bytes = os.fstat(fd), _head_bytes(len(memory))
    if stat.st_uid not in {0, os.geteuid()} or stat.st_mode & 0o022:
        raise _Unusable("others may have written it")
    if stat.st_size != head_bytes + len(memory):
        raise _Unusable(f"it has `{stat.st_size}` bytes, not `{head_bytes + len(memory)}`")
    head, facts = os.pread(fd, head_bytes, 0), _facts(name, len(memory))
    end = len(facts) + 4 * -(-len(memory) // _PIECE)
    if head[: len(facts)] != facts:
        raise _Unusable("it holds something else")
    if zlib.crc32(head[:end]) != int.from_bytes(head[end : end + 4], "little"):
        raise _Unusable("its head is damaged")
    sums = np.frombuffer(head[len(facts) : end], "<u4")

    def read_piece(number: int) -> bool:
        """Whether the piece is what was written. The system's calls give the GIL away."""
        piece = memory.data[number * _PIECE : (number + 1) * _PIECE]
        num_read = 0
        while num_read < len(piece):
            got = os.preadv(fd, [piece[num_read:]], head_bytes + number * _PIECE + num_read)
            if not got:
                return False
            num_read += got
        return zlib.crc32(piece) == int(sums[number])

    with ThreadPoolExecutor(min(num_usable_cores(), _MAX_READERS)) as readers:
        if not all(readers.map(read_piece, range(len(sums)))):
            raise _Unusable("its weights are damaged")

"""The two hashes by which a hub names content: SHA-256 of large files, git's SHA-1 of small ones.

A blob of the cache is called by its hash, so that a file can be checked by its name alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 or a git object's SHA-1, in lower-case hexadecimal."""
    return _DIGEST.fullmatch(text) is not None


def hash_for(digest: str, num_bytes: int) -> Hash:
    """An empty hash of the kind that `digest` is, for a content of so many bytes."""
    assert is_digest(digest)
    if len(digest) == 64:
        return hashlib.sha256()
    # git's name of a blob; nothing here trusts SHA-1 against an attacker who owns the repository
    return hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)


def is_intact(file: Path, digest: str, told: Callable[[int], object]) -> bool:
    """Whether a file has the content that `digest` says; `told` gets the bytes that were read.

    Raises:
        OSError: it cannot be read.
    """
    buffer = bytearray(_CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        found = hash_for(digest, file.stat().st_size)
        while num_bytes := opened.readinto(buffer):
            found.update(memoryview(buffer)[:num_bytes])
            told(num_bytes)
    return found.hexdigest() == digest

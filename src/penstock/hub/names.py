"""What a model may be called, and what a file of a repository may be called.

Owns the grammar `org/name[@revision][:variant]` and the rule for file names. Knows neither network
nor disk.
Invariant: a name that passed here, joined to a directory with `/`, stays within that directory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from penstock.errors import ConfigError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([^@:]+))?(?::([^@:]+))?")
_REVISION_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")
_VARIANT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_./-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_CHARACTERS = 96  # of a repository's name, as the hub has it
_MAX_REVISION_CHARACTERS = 200
_MAX_PART_BYTES = 255  # what file systems take
_MAX_PARTS = 8

GRAMMAR = "`org/name`, `org/name@revision` or `org/name:Q4_K_M`"


@dataclass(frozen=True, slots=True)
class HubName:
    """A model of a hub: repository, revision if one was named, GGUF variant if one was named."""

    repo: str
    revision: str | None = None
    variant: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.variant}" if self.variant else "")


def parse(name: str) -> HubName | None:
    """The model of a hub that `name` means; None: it is no such name.

    Raises:
        ConfigError: it is one, with a revision that cannot be.
    """
    found = _NAME.fullmatch(name)
    if found is None or len(found[1]) > _MAX_CHARACTERS or "--" in found[1] or ".." in found[1]:
        return None
    if found[3] is not None and not (_VARIANT.fullmatch(found[3]) and is_safe_file(found[3])):
        return None
    if found[2] is not None:
        check_revision(found[2])
    return HubName(found[1], found[2], found[3])


def check_revision(revision: str) -> None:
    """Refuse what is no branch, tag or commit, or no safe name of a file below `refs`.

    Raises:
        ConfigError: it is not.
    """
    parts = revision.split("/")
    is_right = (
        len(revision) <= _MAX_REVISION_CHARACTERS
        and len(parts) <= _MAX_PARTS
        and all(_REVISION_PART.fullmatch(part) and ".." not in part for part in parts)
    )
    if not is_right:
        raise ConfigError(
            f"`revision` is `{ascii(revision)[1:-1][:100]}`; it must be a branch, a tag or a "
            "commit."
        )


def is_commit(text: str) -> bool:
    """Whether it is the full name of a commit: 40 hexadecimal digits."""
    return _COMMIT.fullmatch(text) is not None


def is_safe_file(name: str) -> bool:
    """Whether a stranger's file name is relative, stays below, and can be a file on any system."""
    parts = name.split("/")
    return len(parts) <= _MAX_PARTS and all(
        part not in ("", ".", "..")
        and part.isprintable()
        and not set(part) & set('\\:*?"<>|')
        and len(part.encode("utf-8", "surrogatepass")) <= _MAX_PART_BYTES
        for part in parts
    )

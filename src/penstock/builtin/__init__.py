"""The models that ship with the package, as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

NAMES = ("brook", "brook-draft")


def path(name: str) -> Path:
    """The directory of a shipped model; KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return Path(__file__).parent / name

"""The models that ship with the package, as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

from penstock.errors import ConfigError

NAMES = ("brook", "brook-draft")


def path(name: str) -> Path:
    """The directory of a shipped model; KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return Path(__file__).parent / name


def resolve_model(name: str) -> Path:
    """The directory that `name` means: a model that ships with penstock, or a directory itself.

    Raises:
        ConfigError: it is neither.
    """
    if name in NAMES:  # `./brook` is the directory of that name
        return path(name)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    raise ConfigError(
        f"`model` is `{name}`, which is neither a directory nor a built-in model.",
        hint="built-in: " + ", ".join(f"`{known}`" for known in NAMES),
    )

"""Reads the files of published data sets. Knows no task."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError


def data_dir(given: Path | None) -> Path:
    """The directory of published data sets: what was given, else PENSTOCK_DATA.

    Raises:
        ConfigError: neither names a directory.
    """
    found = given or Path(os.environ.get("PENSTOCK_DATA", ""))
    if (given is None and "PENSTOCK_DATA" not in os.environ) or not found.is_dir():
        raise ConfigError(
            f"`{found}` is no directory of data sets." if given else "`--data` is not given.",
            hint="name the directory that holds `eval-gsm8k`, `eval-ifeval` and the others",
        )
    return found


def reason_of(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return f"it is no UTF-8 text at byte {error.start}"


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ConfigError: it is not there, or is not UTF-8.
    """
    return [line for line in _lines(path) if line.strip()]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file `{path}` cannot be read: {reason_of(error)}.") from None
    return text.split("\n")


def read_jsonl(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with the fields `needed`.

    Raises:
        ConfigError: it is not there, or a line is no such object.
    """
    return [row for _, row in numbered_jsonl(path, *needed)]


def numbered_jsonl(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Like `read_jsonl`, each with the number of its line."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Line `{number}` of `{path}` is no JSON: {error}.") from None
        if not isinstance(row, dict):
            raise ConfigError(f"Line `{number}` of `{path}` is no JSON object.")
        for name in needed:
            if name not in row:
                raise ConfigError(f"Line `{number}` of `{path}` has no `{name}`.")
        yield number, row

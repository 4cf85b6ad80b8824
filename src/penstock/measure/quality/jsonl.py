"""Reads the files of published data sets. Knows no task."""

from __future__ import annotations

import json
import os
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


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ConfigError: it is not there, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data set `{path}` cannot be read: {error}.") from None
    return [line for line in text.split("\n") if line.strip()]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ConfigError: it is not there, or a line is no JSON.
    """
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"Line `{number}` of `{path}` is no JSON: {error}.") from None
    return rows

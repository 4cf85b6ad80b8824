"""The JSON files of a model directory. Imports no torch, so that a wrong one is told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError


def read_config(path: Path | str) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        ModelLoadError: there is no such file, or it is not a JSON object.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelLoadError(f"`{directory}` is not a directory with a model.")
    config = read_json(directory / "config.json")
    if config is None:
        raise ModelLoadError(f"`{directory}` has no `config.json`.")
    return config


def read_generation_eos(path: Path | str) -> tuple[int, ...]:
    """The end-of-sequence ids of generation_config.json and config.json, each once."""
    ids: dict[int, None] = {}
    for config in (read_json(Path(path) / "generation_config.json") or {}, read_config(path)):
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if type(token_id) is int and token_id >= 0:
                ids[token_id] = None
            elif token_id is not None:
                raise ModelLoadError(
                    f"`eos_token_id` is `{value!r}` in `{path}`; it must be a token id or a list "
                    "of them."
                )
    return tuple(ids)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelLoadError(f"`{file}` cannot be read: {error}.") from error
    except ValueError as error:
        raise ModelLoadError(f"`{file}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"`{file}` does not hold a JSON object.")
    return content

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
    """The end-of-sequence ids of generation_config.json and config.json, each once.

    Raises:
        ModelLoadError: they are not ids of the vocabulary.
    """
    ids: dict[int, None] = {}
    model = read_config(path)
    vocab_size = model.get("vocab_size")
    if type(vocab_size) is not int:
        raise ModelLoadError(f"`vocab_size` is `{vocab_size!r}` in `{path}`; it must be a number.")
    for config in (read_json(Path(path) / "generation_config.json") or {}, model):
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ModelLoadError(
                    f"`eos_token_id` is `{value!r}` in `{path}`; it must be a token id or a list "
                    f"of them, below `vocab_size`, which is `{vocab_size}`."
                )
            ids[token_id] = None
    return tuple(ids)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelLoadError(f"`{file}` cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"`{file}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"`{file}` does not hold a JSON object.")
    return content

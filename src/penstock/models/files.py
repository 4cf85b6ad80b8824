"""The JSON files of a model directory. Imports no torch, so that a wrong one is told at once."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError

MAX_JSON_BYTES = 64 * 2**20  # the largest index published has 15
_PARAMS = "params.json"  # of checkpoints in Mistral's own form


def is_gguf(path: Path | str) -> bool:
    """Whether a model is one GGUF file, by its name."""
    return Path(path).suffix.lower() == ".gguf"


def is_consolidated(path: Path) -> bool:
    """Whether a directory is of Mistral's own form: with a config.json, by its weights."""
    if not (path / _PARAMS).is_file():
        return False
    names = [file.name for file in path.glob("*.safetensors")]
    has_only_these = bool(names) and all(name.startswith("consolidated") for name in names)
    return has_only_these or not (path / "config.json").exists()


def read_config(path: Path | str) -> dict[str, Any]:
    """The model's config.json, or what a GGUF file or Mistral's params.json says in its terms.

    Raises:
        ModelLoadError: there is no such file, or it is not a JSON object.
    """
    directory = Path(path)
    if is_gguf(directory):
        from penstock.models import gguf_model

        return gguf_model.read_config(directory)
    if not directory.is_dir():
        raise ModelLoadError(f"`{directory}` is neither a directory with a model nor a GGUF file.")
    if is_consolidated(directory):
        from penstock.models import consolidated

        return consolidated.config_of(read_json(directory / _PARAMS) or {})
    config = read_json(directory / "config.json")
    if config is None:
        raise ModelLoadError(f"`{directory}` has no `config.json`.")
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        from penstock.models.safetensors import number_type

        file = min(directory.glob("*.safetensors"), default=None)
        if file is not None and (dtype := number_type(file)):  # GPT-OSS's config does not say it
            config["dtype"] = dtype
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
        raise ModelLoadError(
            f"`vocab_size` is `{vocab_size!r:.80}` in `{path}`; it must be a number."
        )
    generation = None if is_gguf(path) else read_json(Path(path) / "generation_config.json")
    for config in (generation or {}, model):
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ModelLoadError(
                    f"`eos_token_id` is `{value!r:.80}` in `{path}`; it must be a token id or a "
                    f"list of them, below `vocab_size`, which is `{vocab_size}`."
                )
            ids[token_id] = None
    return tuple(ids)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        status = file.stat()
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):  # they may never end
            raise ModelLoadError(f"`{file}` cannot be read: it is no file.")
        if status.st_size > MAX_JSON_BYTES:
            raise ModelLoadError(
                f"`{file}` has `{status.st_size}` bytes, more than the `{MAX_JSON_BYTES}` that are "
                "read."
            )
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

"""What a model directory says about its tokenizer, besides the vocabulary.

Owns the reading of `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and the
files of chat templates, in the order of precedence that transformers has. Knows no tokenizer
library. Invariant: what it gives is bounded, so that nobody who builds on it has to check again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import ModelLoadError

MAX_FILE_BYTES = 128 * 2**20  # four times the largest tokenizer published
MAX_TOKEN_CHARS = 512
MAX_TOKEN_ID = 2**20

_NAMED_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_LISTS = ("extra_special_tokens", "additional_special_tokens")


class AddedToken(NamedTuple):
    """A string that is a token wherever it stands in a text.

    Attributes:
        normalized: looked for in the text after the normalizer, not before.
        lstrip, rstrip: it swallows the white space before or behind it.
        single_word: it counts only where no letter touches it.
    """

    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenizerSettings(NamedTuple):
    """What the files beside a vocabulary say.

    Attributes:
        named: `bos_token`, `eos_token`, ... and whatever else is called `..._token`.
        unnamed: of those names, the ones that the files say stand for nothing.
        added: tokens whose ids the files give.
        special: strings that are special tokens, wherever their ids come from.
        chat_templates: sources by name; the usual one is "default".
        tokenizer_class: transformers' name of the class; None if it is not said.
    """

    named: dict[str, str]
    unnamed: frozenset[str]
    added: dict[int, AddedToken]
    special: list[str]
    chat_templates: dict[str, str]
    tokenizer_class: str | None
    add_bos: bool | None
    add_eos: bool | None
    add_prefix_space: bool


def read_settings(directory: Path) -> TokenizerSettings:
    """Read all files of a directory that concern its tokenizer but the vocabulary.

    Raises:
        ModelLoadError: a file is no valid JSON, or holds what cannot be meant.
    """
    file = directory / "tokenizer_config.json"
    config = read_json(file)
    sources: list[Mapping[str, Any]] = [config]
    if "added_tokens_decoder" not in config:  # it was written by a version that left the map behind
        sources.append(read_json(directory / "special_tokens_map.json"))
    else:
        sources.append(_only_named(read_json(directory / "special_tokens_map.json")))
    named = _named_tokens(sources)
    special = list(dict.fromkeys([*named.values(), *_listed_tokens(sources)]))
    added = _decoder_tokens(config.get("added_tokens_decoder"), file)
    added |= _added_tokens_file(directory / "added_tokens.json", special)
    for text in (*special, *(token.content for token in added.values())):
        if len(text) > MAX_TOKEN_CHARS:
            raise ModelLoadError(
                f"`{directory}` has a special token of `{len(text)}` characters, "
                f"more than `{MAX_TOKEN_CHARS}`."
            )
    class_name = config.get("tokenizer_class")
    return TokenizerSettings(
        named=named,
        unnamed=frozenset(n for source in sources for n, v in source.items() if v is None)
        - {*named},
        added=added,
        special=special,
        chat_templates=_chat_templates(directory, config),
        tokenizer_class=class_name if isinstance(class_name, str) else None,
        add_bos=_flag(config, "add_bos_token", file),
        add_eos=_flag(config, "add_eos_token", file),
        add_prefix_space=bool(_flag(config, "add_prefix_space", file)),
    )


def read_bytes(file: Path) -> bytes:
    """The content of a file that is not too large.

    Raises:
        ModelLoadError: it is, or it cannot be read.
    """
    try:
        check_size(file)
        return file.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"`{file}` cannot be read: {error}.") from error


def check_size(file: Path) -> None:
    """Refuse a file that is too large to be what it should be."""
    num_bytes = file.stat().st_size
    if num_bytes > MAX_FILE_BYTES:
        raise ModelLoadError(
            f"`{file}` has `{num_bytes}` bytes, more than the `{MAX_FILE_BYTES}` that are read."
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"`{file}` is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"`{file}` holds no JSON object.")
    return value


def _flag(config: Mapping[str, Any], key: str, file: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelLoadError(f"`{key}` in `{file}` is neither true nor false.")
    return value


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _only_named(source: Mapping[str, Any]) -> dict[str, Any]:
    return {name: source[name] for name in _NAMED_TOKENS if name in source}


def _named_tokens(sources: list[Mapping[str, Any]]) -> dict[str, str]:
    """The named special tokens; an earlier source wins."""
    found: dict[str, str] = {}
    for source in sources:
        names = [name for name in source if name.endswith("_token") and name not in _NAMED_TOKENS]
        for name in (*_NAMED_TOKENS, *names):
            if text := _content(source.get(name)):
                found.setdefault(name, text)
        for key in _LISTS:
            extra = source.get(key)
            for name, value in extra.items() if isinstance(extra, dict) else ():
                if text := _content(value):
                    found.setdefault(name, text)
    return found


def _listed_tokens(sources: list[Mapping[str, Any]]) -> list[str]:
    """The special tokens that have no name."""
    lists = [source.get(key) for source in sources for key in _LISTS]
    values = [value for entries in lists if isinstance(entries, list) for value in entries]
    return [text for value in values if (text := _content(value))]


def _decoder_tokens(entries: Any, file: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: tokens by id, as transformers has written them since 4.34."""
    tokens: dict[int, AddedToken] = {}
    try:
        for key, entry in (entries or {}).items():
            special = bool(entry.get("special", False))
            flags = {
                name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")
            }
            tokens[_checked_id(int(key))] = AddedToken(
                str(entry["content"]), special, bool(entry.get("normalized", not special)), **flags
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"`added_tokens_decoder` in `{file}` cannot be read: {error!r}."
        ) from error
    return tokens


def _added_tokens_file(file: Path, special: list[str]) -> dict[int, AddedToken]:
    """`added_tokens.json`: ids by string, as transformers wrote them before 4.34."""
    tokens: dict[int, AddedToken] = {}
    for text, token_id in read_json(file).items():
        if type(token_id) is not int:
            raise ModelLoadError(f"`{file}` gives `{text[:64]}` an id that is no number.")
        try:
            tokens[_checked_id(token_id)] = AddedToken(text, text in special, text not in special)
        except ValueError as error:
            raise ModelLoadError(f"`{file}` cannot be read: {error}.") from error
    return tokens


def _checked_id(token_id: int) -> int:
    if not 0 <= token_id < MAX_TOKEN_ID:
        raise ValueError(f"the id {token_id} is not between 0 and {MAX_TOKEN_ID}")
    return token_id


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All template sources of a directory. Beside `chat_template.jinja` the configuration's are not
    read, which may be older."""
    others = sorted(directory.glob("additional_chat_templates/*.jinja"))
    files = {file.stem: _read_text(file) for file in others}
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return {**files, "default": _read_text(jinja)}
    processor = directory / "chat_template.json"  # beside models that also take images
    file = processor if processor.is_file() else directory / "tokenizer_config.json"
    entries = read_json(processor) if processor.is_file() else config
    return {**_template_entries(entries.get("chat_template"), file), **files}


def _template_entries(entries: Any, file: Path) -> dict[str, str]:
    match entries:
        case None:
            return {}
        case str(source):
            return {"default": source}
        case dict():
            named = [{"name": name, "template": source} for name, source in entries.items()]
        case list():
            named = entries
        case _:
            raise ModelLoadError(f"`chat_template` in `{file}` is no text.")
    templates: dict[str, str] = {}
    for entry in named:
        match entry:
            case {"name": str(name), "template": str(source)}:
                templates[name] = source
            case _:
                raise ModelLoadError(
                    f"`chat_template` in `{file}` has an entry without `name` and `template`."
                )
    return templates


def _read_text(file: Path) -> str:
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"`{file}` cannot be read: {error}.") from error

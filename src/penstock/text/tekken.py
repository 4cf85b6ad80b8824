"""Mistral's `tekken.json`: byte-level BPE by ranks, as tiktoken has it, behind special tokens.

Owns that file's format; its source is mistral-common's `tekken.py`. How the result encodes is the
business of `penstock.text.backends`. Invariant: special token number i has the id i, and the token
of rank r the id r plus the number of special tokens, whether they are named or not.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import ModelLoadError
from penstock.text.backends import BYTES_LETTERS, HuggingFaceBackend
from penstock.text.directory import MAX_TOKEN_ID, TokenizerSettings, read_json

_NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
# Of files that do not list them: versions up to 7.
_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip
MAX_TOKEN_BYTES = 1024  # the longest one published has 128
_MAX_SPECIAL = 20_000


class _Content(NamedTuple):
    """What the file says."""

    pattern: str  # of what is encoded by itself
    special: list[str]  # by id
    tokens: list[bytes]  # by rank


def from_tekken(
    file: Path, settings: TokenizerSettings
) -> tuple[HuggingFaceBackend, dict[str, str]]:
    """The tokenizer of a `tekken.json`, and its named special tokens.

    Raises:
        ModelLoadError: the file is broken.
    """
    content = _read(file)
    known = frozenset(content.special)
    named = {name: text for name, text in _NAMED.items() if text in known}
    vocabulary, merges = _vocabulary(file, content)

    def build() -> Any:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
        library = tokenizers.Tokenizer(model)
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(content.pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens(
            [
                tokenizers.AddedToken(text, special=True, normalized=False)
                for text in content.special
            ]
        )
        around = (("bos_token", settings.add_bos is not False), ("eos_token", settings.add_eos))
        first, last = (named.get(name) if is_wanted else None for name, is_wanted in around)
        library.post_processor = processors.TemplateProcessing(
            single=[part for part in (first, "$A", last) if part],
            special_tokens=[(text, vocabulary[text]) for text in (first, last) if text],
        )
        return library

    return HuggingFaceBackend(file, build), named


def _read(file: Path) -> _Content:
    told = read_json(file)
    config, vocabulary = told.get("config"), told.get("vocab")
    if not isinstance(config, dict) or not isinstance(vocabulary, list):
        raise ModelLoadError(f"`{file}` has no `config` object and `vocab` list.")
    pattern = config.get("pattern")
    if not isinstance(pattern, str):
        raise ModelLoadError(f"`config.pattern` in `{file}` is no text.")
    sizes = []
    for key in ("default_vocab_size", "default_num_special_tokens"):
        size = config.get(key)
        if type(size) is not int or not 0 < size <= MAX_TOKEN_ID:
            raise ModelLoadError(f"`config.{key}` in `{file}` is no size up to `{MAX_TOKEN_ID}`.")
        sizes.append(size)
    size, num_special = sizes
    num_tokens = size - num_special
    if num_special > _MAX_SPECIAL or not 256 <= num_tokens <= len(vocabulary):
        raise ModelLoadError(
            f"`config.default_vocab_size` in `{file}` is `{size}` with `{num_special}` special "
            f"tokens, where `vocab` has `{len(vocabulary)}` entries: it fits neither these nor the "
            "`256` bytes."
        )
    special = _special(file, told.get("special_tokens"), num_special)
    return _Content(pattern, special, _tokens(file, vocabulary[:num_tokens]))


def _special(file: Path, entries: Any, num_special: int) -> list[str]:
    """The special tokens by id; those that are not named are called by their number."""
    if entries is None:
        entries = [{"rank": rank, "token_str": text} for rank, text in enumerate(_SPECIAL)]
    found: list[str] = []
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case {"rank": int(rank), "token_str": str(text)} if rank == len(found) and text:
                found.append(text)
            case _:
                raise ModelLoadError(
                    f"`special_tokens` in `{file}` is no list of objects with `rank`, from 0 on, "
                    "and `token_str`."
                )
    found += [f"<SPECIAL_{number}>" for number in range(len(found), num_special)]
    if len(found) > num_special or len(set(found)) < len(found):
        raise ModelLoadError(
            f"`special_tokens` in `{file}` has `{len(found)}` entries; it must have at most "
            f"`{num_special}`, each once."
        )
    return found


def _tokens(file: Path, entries: list[Any]) -> list[bytes]:
    """The bytes of each token by rank; the first 256 are the bytes themselves."""
    found: list[bytes] = []
    for rank, entry in enumerate(entries):
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
            is_right = type(entry["rank"]) is int and entry["rank"] == rank
        except (TypeError, KeyError, ValueError, binascii.Error):
            is_right = False
        if not is_right or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ModelLoadError(
                f"`vocab` in `{file}` has no token of rank `{rank}` in its place: `rank`, and 1 to "
                f"`{MAX_TOKEN_BYTES}` bytes in base64 as `token_bytes`."
            )
        found.append(token)
    if found[:256] != [bytes([byte]) for byte in range(256)] or len(set(found)) < len(found):
        raise ModelLoadError(
            f"`vocab` in `{file}` must begin with the `256` bytes, and have each token once."
        )
    return found


def _vocabulary(file: Path, content: _Content) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by the library's spelling, and every pair that makes a token, in the order of ranks.

    tiktoken merges whatever two neighbours make a token, the lowest rank first; this library has a
    list of pairs.
    """
    ranks = {token: rank for rank, token in enumerate(content.tokens)}
    letters = {token: "".join(BYTES_LETTERS[byte] for byte in token) for token in ranks}
    ids = {text: number for number, text in enumerate(content.special)}
    for token, rank in ranks.items():
        if letters[token] in ids:
            raise ModelLoadError(
                f"`vocab` in `{file}` has the special token `{ascii(letters[token])[1:-1]}` too."
            )
        ids[letters[token]] = len(content.special) + rank
    merges: list[tuple[str, str]] = []
    for token in content.tokens:
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(one, other) for one, other in cuts if one in ranks and other in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(letters[one], letters[other]) for one, other in pairs]
    return ids, merges

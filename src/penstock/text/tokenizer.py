"""Text to token ids and back, for one model directory.

Owns the reading of a directory's tokenizer files, and the one definition of the text of a token
sequence: the bytes of its tokens, joined, decoded as UTF-8, each maximal invalid part replaced by
U+FFFD. `Detokenizer` computes the same piecemeal. Imports its libraries only when it loads a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from penstock.errors import InvalidField, ModelLoadError
from penstock.text.backends import (
    Backend,
    HuggingFaceBackend,
    encode_parts,
    room_within,
    split_at,
)
from penstock.text.directory import MAX_TOKEN_CHARS, read_settings
from penstock.text.huggingface import (
    END_OF_TEXT,
    GPT2_CLASSES,
    VOCABULARY,
    from_tokenizer_json,
    from_vocabulary,
)
from penstock.text.sentencepiece_backend import SentencePieceBackend

_MAX_SPECIAL_SQUARES = 20_000_000  # memory of all their parts; 6,000 of 15 characters have 1.4e6
TEKKEN = "tekken.json"
_VERSION = re.compile(r"\.v(\d+)")
# The last variation selector, which no character uses. It is no space, has no case, and counts as
# printable, so that templates take it for an ordinary part of a word.
_SENTINEL = "\U000e01ef"


class Tokenizer:
    """A model's tokenizer. Thread-safe; shared by all requests.

    Attributes:
        vocab_size: one more than the largest token id. (The model may have more rows.)
        special_ids: ids that are structure, not text: hidden by `skip_special_tokens`.
        special_tokens: the named ones, by the names that templates use (`bos_token`, ...).
        chat_templates: the sources found in the directory, by name; the usual one is "default".
        bos_id: the token that begins a sequence; None where the directory names none.
        drops_leading_space: a text's first token loses one leading space (SentencePiece).
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        chat_templates: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.drops_leading_space = backend.drops_leading_space
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        bos = self.special_tokens.get("bos_token")
        self.bos_id = None if bos is None else backend.piece_id(bos)
        named = (backend.piece_id(text) for text in self.special_tokens.values())
        self.special_ids = backend.special_ids | {i for i in named if i is not None}
        self._bytes: dict[int, bytes] = {}
        strings = frozenset(text for i in self.special_ids if (text := self.token_text(i)))
        longest = max(map(len, strings), default=0)
        if longest > MAX_TOKEN_CHARS or sum(len(s) ** 2 for s in strings) > _MAX_SPECIAL_SQUARES:
            raise ModelLoadError(
                f"its `{len(strings)}` special tokens, of up to `{longest}` characters, are too "
                "many or too long."
            )
        self._special = split_at(strings)
        self._special_prefixes = tuple({s[:end] for s in strings for end in range(1, len(s))})
        self._special_suffixes = frozenset(s[i:] for s in strings for i in range(1, len(s)))
        self._max_suffix = max(map(len, self._special_suffixes), default=0)
        self._special_insides = _SENTINEL.join(s[1:-1] for s in strings)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text.

        Args:
            add_special_tokens: add what the model expects around a prompt (beginning of sequence).
                False for a rendered chat template, which writes it itself.
            parse_special: strings like "<|im_end|>" in the text become the token. With False they
                stay text, and the result holds no special id but the added ones.
        """
        text = _well_formed(text)
        if parse_special:
            return self._backend.encode(text, with_affixes=add_special_tokens)
        ids = self._backend.encode_plain(text, at_start=True)
        if not add_special_tokens:
            return ids
        affixes = self._backend.encode("", with_affixes=True)
        split = 1 if affixes[:1] == [self.bos_id] else 0
        return [*affixes[:split], *ids, *affixes[split:]]

    def encode_pair(
        self, first: str, second: str | None = None, *, max_tokens: int | None = None
    ) -> tuple[list[int], int]:
        """The ids of one text or of two as encoders read them, and where the second begins.

        Special tokens are put around and between them and are parsed in the texts. More than
        `max_tokens` in all are cut off the ends of the texts, off the longer one first.

        Returns:
            The ids, and the index of the first that has the second type; 0: all have the first.

        Raises:
            InvalidField: `max_tokens` leaves no room, or the tokenizer knows no pairs.
        """
        first = _well_formed(first)
        second = None if second is None else _well_formed(second)
        if isinstance(self._backend, HuggingFaceBackend):
            return self._backend.encode_pair(first, second, max_tokens)
        if second is not None:
            raise InvalidField("The model's tokenizer knows no pairs of texts.", field="query")
        ids = self._backend.encode(first, with_affixes=True)
        if max_tokens is not None and len(ids) > max_tokens:
            around = self._backend.encode("", with_affixes=True)
            pairs = zip(around, ids, strict=False)
            num_before = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            room = room_within(max_tokens, len(around))
            ids = ids[: num_before + room] + around[num_before:]
        return ids, 0

    def guard(self, text: str, label: bool = False) -> str:
        """Break the special-token strings in a text from outside, also those that it could
        complete with what a template puts before and behind it.

        For text that a template will embed: `encode_guarded` then takes it for mere text. That
        holds for text which the template leaves as it is or trims, not where it cuts, replaces or
        changes the case of characters.

        Args:
            label: the text is something like a role: templates compare it with their own words,
                and may write a special token around the whole of it.
        """
        if self._special is None:
            return text
        text = text.replace(_SENTINEL, "\ufffd")
        while self._special.search(text):
            text = self._special.sub(_broken, text)
        core = text.strip()  # templates trim; the breaks must neither be lost nor prevent it
        if not core:
            return text
        guarded = core + _SENTINEL if core.endswith(self._special_prefixes) else core
        ends = any(core[:n] in self._special_suffixes for n in range(1, self._max_suffix + 1))
        if ends or (not label and core in self._special_insides):
            guarded = _SENTINEL + guarded
        return text.replace(core, guarded)

    def encode_guarded(self, text: str) -> list[int]:
        """The ids of a rendered template, into which foreign text came through `guard`.

        Special tokens are parsed where they stand unbroken, spelt as in the vocabulary; no affixes
        are added.
        """
        text = _well_formed(text)
        parts = self._special.split(text) if self._special is not None else [text]
        return encode_parts(self._backend, [part.replace(_SENTINEL, "") for part in parts])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a sequence; ids outside the vocabulary have none."""
        hidden = self.special_ids if skip_special_tokens else ()
        data = b"".join(self.token_bytes(i) for i in ids if i not in hidden)
        if self.drops_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has already begun; a special token: its own string."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._backend.piece_bytes(token_id)
        return data

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_str(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None if there is no such token."""
        return self._backend.piece(token_id)

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary piece, spelt as in `token_str`."""
        return self._backend.piece_id(piece)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model directory, or one tokenizer file with what lies beside it.

    A GGUF file has its tokenizer in itself.

    `tokenizer.json` is taken first, then `tokenizer.model`, then Mistral's `tekken.json` or the
    newest `*.model.v*`, then GPT-2's `vocab.json` with `merges.txt`.

    Raises:
        ModelLoadError: no tokenizer is there, or a file is broken.
        UnsupportedModel: a tokenizer.json decodes in a way that cannot be streamed, or a vocabulary
            is of a kind that is not known.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from penstock.text.gguf_tokenizer import load_gguf  # which takes numpy

        return _made(path, *load_gguf(path))
    settings = read_settings(path if path.is_dir() else path.parent)
    file = _find_file(path)
    named = settings.named
    backend: Backend
    if file.name == VOCABULARY or settings.tokenizer_class in GPT2_CLASSES:
        names = (f"{name}_token" for name in ("bos", "eos", "unk"))
        own = {name: END_OF_TEXT for name in names if name not in settings.unnamed}
        named = own | named
        settings = settings._replace(named=named, special=[*settings.special, *named.values()])
    if file.name == VOCABULARY:
        backend = from_vocabulary(file, settings)
    elif file.name.startswith("tekken") and file.suffix == ".json":
        from penstock.text.tekken import from_tekken

        backend, own = from_tekken(file, settings)
        named = own | named
    elif file.suffix == ".json":
        backend = from_tokenizer_json(file, settings)
    else:
        backend = SentencePieceBackend(
            file,
            added={token_id: token.content for token_id, token in settings.added.items()},
            special=[token_id for token_id, token in settings.added.items() if token.special],
            named=settings.special,
            add_bos=settings.add_bos is not False,
            add_eos=bool(settings.add_eos),
        )
        named = {**backend.named_tokens, **named}
    return _made(file, backend, named, settings.chat_templates)


def _made(
    file: Path, backend: Backend, named: Mapping[str, str], chat_templates: Mapping[str, str]
) -> Tokenizer:
    try:
        return Tokenizer(backend, special_tokens=named, chat_templates=chat_templates)
    except ModelLoadError as error:
        raise ModelLoadError(f"`{file}` cannot be used: {error.message}") from error


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("tokenizer.json", "tokenizer.model", TEKKEN):
        if (path / name).is_file():
            return path / name
    versions = [f for f in path.glob("*.model.v*") if _VERSION.match(f.suffix)]
    if versions:
        return max(versions, key=lambda file: (int(_VERSION.findall(file.suffix)[0]), file.name))
    if (path / VOCABULARY).is_file():
        return path / VOCABULARY
    raise ModelLoadError(
        f"`{path}` holds no tokenizer.",
        hint="wanted is `tokenizer.json`, `tokenizer.model`, `tekken.json`, `*.model.v*`, or "
        "`vocab.json` with `merges.txt`.",
    )


def _broken(match: re.Match[str]) -> str:
    string = match[0]
    return string[0] + _SENTINEL + string[1:] if len(string) > 1 else "\ufffd"


def _well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which have no bytes, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""What a tokenizer needs of a library, and the `tokenizers` library behind it.

Owns how that library spells a vocabulary piece as bytes and how it encodes plain text; the other
library is in `penstock.text.sentencepiece_backend`. Knows no configuration files, no
beginning-of-sequence token and no streaming: those are `Tokenizer`'s. Invariant: the bytes of a
piece do not depend on its neighbours, so that the text of a sequence is the concatenation of its
pieces' bytes, less one leading space where `drops_leading_space`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from penstock.errors import InvalidField, ModelLoadError, UnsupportedModel

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_PIECE = "\u2581"  # how SentencePiece writes a space
_MARK = secrets.token_hex(16)  # no text holds it but by our hand


class Backend(Protocol):
    """What `Tokenizer` needs of a library."""

    vocab_size: int  # added tokens included
    special_ids: frozenset[int]
    drops_leading_space: bool  # the library puts a space in front of a text and hides it again

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None if there is no such token."""

    def piece_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that has already begun; b"" if there is no such token."""

    def piece_id(self, piece: str) -> int | None:
        """The inverse of `piece`."""

    def encode(self, text: str, *, with_affixes: bool) -> list[int]:
        """Encode; special-token strings in the text become special ids.

        Args:
            with_affixes: add what the model expects around a text (beginning of sequence, ...).
        """

    def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        """Encode text as mere text: the result holds no special id.

        Args:
            at_start: the text begins the prompt (else it follows a special token).
        """


def split_at(strings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern whose `split` keeps the strings, longest first; None if there are none."""
    ordered = sorted((s for s in strings if s), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def encode_parts(backend: Backend, parts: Sequence[str]) -> list[int]:
    """Encode a text of which it is known what in it is special.

    Args:
        parts: by turns mere text (perhaps "") and the string of a special token.
    """
    if isinstance(backend, HuggingFaceBackend):  # there, what a text follows counts in many ways
        return backend.encode_parts(parts)
    ids: list[int] = []
    for index, part in enumerate(parts):
        if index % 2:
            token_id = backend.piece_id(part)
            assert token_id is not None
            ids.append(token_id)
        elif part:
            ids.extend(backend.encode_plain(part, at_start=index == 0))
    return ids


@contextmanager
def loading(path: Path, kind: str = "tokenizer file") -> Iterator[None]:
    """Whatever a library has against a file becomes one sentence.

    Raises:
        ModelLoadError: the library refused the file, or gave up inside.
    """
    try:
        yield
    except BaseException as error:
        raise ModelLoadError(f"`{path}` is no {kind}: {_reason(error)}.") from error


@contextmanager
def encoding() -> Iterator[None]:
    """Whatever a library has against a text becomes one sentence.

    Raises:
        InvalidField: the library refused the text, or gave up inside.
    """
    try:
        yield
    except BaseException as error:
        raise InvalidField(
            f"The tokenizer cannot encode the text: {_reason(error)}.", field="prompt"
        ) from error


def _reason(error: BaseException) -> str:
    """What a library says; an error that is none of its failures is raised again.

    The libraries raise nothing narrower than Exception, and where their Rust code gives up,
    something that is not even that.
    """
    is_panic = type(error).__name__ == "PanicException"
    if isinstance(error, ModelLoadError) or not (is_panic or isinstance(error, Exception)):
        raise error
    return str(error).strip().rstrip(".") or type(error).__name__


def room_within(max_tokens: int, num_around: int) -> int:
    """Tokens of text that may stay.

    Raises:
        InvalidField: none may.
    """
    if max_tokens <= num_around:
        raise InvalidField(
            f"`truncate_prompt_tokens` is `{max_tokens}`, and `{num_around}` tokens stand around "
            "a text.",
            field="truncate_prompt_tokens",
            hint=f"leave room for more than `{num_around}`",
        )
    return max_tokens - num_around


def shares_of(room: int, lengths: Sequence[int]) -> list[int]:
    """How much of one text or of two may stay, the longer one being cut first."""
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    short, half = min(lengths), room // 2
    if short > half:  # both are cut; the odd token stays with the longer one
        return [room - half, half] if first > second else [half, room - half]
    return [room - short, short] if first > second else [short, room - short]


class HuggingFaceBackend:
    """A tokenizer of the `tokenizers` library.

    Args:
        path: the file it is made of, named in errors.
        build: makes the library's object anew at each call.
    """

    def __init__(self, path: Path, build: Callable[[], Any]) -> None:
        self._path = path
        self._build = build
        self._library = self._open()
        self._added: dict[int, str] = {
            token_id: token.content
            for token_id, token in self._library.get_added_tokens_decoder().items()
        }
        self.vocab_size: int = self._library.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id
            for token_id, token in self._library.get_added_tokens_decoder().items()
            if token.special
        )
        decoder = self._library.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
        self._speller = _Speller(state, path)
        self.drops_leading_space = self._speller.drops_leading_space

    def _open(self) -> Any:
        with loading(self._path):
            library = self._build()
            library.no_truncation()
            library.no_padding()
            library.encode("", add_special_tokens=True)  # affixes can name what is not there
        return library

    @cached_property
    def _blind(self) -> tuple[Any, dict[int, int]]:
        """The same tokenizer, blind to special tokens, in text of any form: those that are meant
        have marks around them, and are tokens of their own, whose ids are mapped here to the true
        ones. Built when a text needs it."""
        import tokenizers

        library = self._open()
        library.encode_special_tokens = True
        true_ids: dict[str, int] = {}
        marked = []
        for token_id, token in library.get_added_tokens_decoder().items():
            content = f"{_MARK}{token.content}{_MARK}"
            true_ids[content] = token_id
            marked.append(
                tokenizers.AddedToken(
                    content,
                    special=False,
                    normalized=False,  # found before a normalizer could make one of other text
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                )
            )
        library.add_tokens(marked)
        return library, {library.token_to_id(text): i for text, i in true_ids.items()}

    def piece(self, token_id: int) -> str | None:
        piece: str | None = self._library.id_to_token(token_id)
        return piece

    def piece_bytes(self, token_id: int) -> bytes:
        # Added tokens stand for themselves. (The library sends them through its decoder too, and
        # garbles those that hold letters of the byte alphabet, as "é".)
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        piece = self.piece(token_id)
        return b"" if piece is None else self._speller.spell(piece)

    def piece_id(self, piece: str) -> int | None:
        token_id: int | None = self._library.token_to_id(piece)
        return token_id

    def encode(self, text: str, *, with_affixes: bool) -> list[int]:
        with encoding():
            ids: list[int] = self._library.encode(text, add_special_tokens=with_affixes).ids
        return ids

    def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        return self.encode_parts([text])

    def encode_pair(
        self, first: str, second: str | None, max_tokens: int | None
    ) -> tuple[list[int], int]:
        """See `Tokenizer.encode_pair`."""
        library = self._library
        with encoding():
            texts = [library.encode(first, add_special_tokens=False)]
            if second is not None:
                texts.append(library.encode(second, add_special_tokens=False))
        if max_tokens is not None:
            num_around = library.num_special_tokens_to_add(second is not None)
            room = room_within(max_tokens, num_around)
            lengths = [len(text.ids) for text in texts]
            for text, length in zip(texts, shares_of(room, lengths), strict=True):
                text.truncate(length)
        whole = library.post_process(*texts, add_special_tokens=True)
        types: list[int] = whole.type_ids
        return whole.ids, types.index(1) if 1 in types else 0

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """See the function `encode_parts`."""
        texts = list(parts)
        texts[1::2] = [f"{_MARK}{part}{_MARK}" for part in parts[1::2]]
        library, true_ids = self._blind
        with encoding():
            ids: list[int] = library.encode("".join(texts), add_special_tokens=False).ids
        return [true_ids.get(token_id, token_id) for token_id in ids]


class _Speller:
    """Turns a vocabulary piece into bytes, after the `decoder` section of a tokenizer.json."""

    def __init__(self, state: Mapping[str, Any], path: Path) -> None:
        self._path = path
        self._byte_level = False
        self._byte_fallback = False
        self._is_word_piece = False
        self._replacements: list[tuple[str, str]] = []
        self.drops_leading_space = False
        self._read(state)

    def _read(self, state: Mapping[str, Any]) -> None:
        match state:
            case {"type": "Sequence", "decoders": list(decoders)}:
                for decoder in decoders:
                    self._read(decoder)
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "WordPiece", "prefix": "##"}:
                self._is_word_piece = True
                self.drops_leading_space = True
            case {"type": "Fuse"}:
                pass  # the bytes are always fused
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                self._replacements.append((old, " "))
                self.drops_leading_space = state.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.drops_leading_space = True
            case _:
                raise UnsupportedModel(
                    f"`{self._path}` has the decoder `{state.get('type')}`, which is not known.",
                    hint="known are byte-level and SentencePiece-like tokenizers.",
                )

    def spell(self, piece: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[char] for char in piece)
            except KeyError:
                return piece.encode()
        if self._byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if self._is_word_piece:
            return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()
BYTE_LETTERS = frozenset(_BYTE_OF)
BYTES_LETTERS = sorted(_BYTE_OF, key=_BYTE_OF.__getitem__)  # by byte

"""The two tokenizer libraries behind one small Protocol.

Owns how a library spells a vocabulary piece as bytes and how it encodes plain text. Knows no
configuration files, no beginning-of-sequence token and no streaming: those are `Tokenizer`'s.
Invariant: the bytes of a piece do not depend on its neighbours, so that the text of a sequence is
the concatenation of its pieces' bytes, less one leading space where `drops_leading_space`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from penstock.errors import ModelLoadError, UnsupportedModel

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


class HuggingFaceBackend:
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._path = path
        self._load = tokenizers.Tokenizer.from_file
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
        try:
            library = self._load(str(self._path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelLoadError(f"`{self._path}` is no tokenizer file: {error}") from error
        library.no_truncation()
        library.no_padding()
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
        ids: list[int] = self._library.encode(text, add_special_tokens=with_affixes).ids
        return ids

    def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        return self.encode_parts([text])

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """See the function `encode_parts`."""
        texts = list(parts)
        texts[1::2] = [f"{_MARK}{part}{_MARK}" for part in parts[1::2]]
        library, true_ids = self._blind
        ids: list[int] = library.encode("".join(texts), add_special_tokens=False).ids
        return [true_ids.get(token_id, token_id) for token_id in ids]


class _Speller:
    """Turns a vocabulary piece into bytes, after the `decoder` section of a tokenizer.json."""

    def __init__(self, state: Mapping[str, Any], path: Path) -> None:
        self._path = path
        self._byte_level = False
        self._byte_fallback = False
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


class SentencePieceBackend:
    """A SentencePiece model, with the tokens a Hugging Face configuration adds to it.

    Args:
        added: strings of the tokens that are not in the model, by id; special ones are split off
            before the model sees a text, and so are the model's own control pieces.
    """

    # Appended to a serialized model, these bytes set normalizer_spec.add_dummy_prefix to false:
    # protobuf merges repeated sub-messages, and the last value wins.
    _NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(
        self,
        path: Path,
        *,
        added: Mapping[int, str],
        special: Iterable[int],
        add_bos: bool,
        add_eos: bool,
    ) -> None:
        import sentencepiece

        try:
            proto = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + self._NO_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ModelLoadError(f"`{path}` is no SentencePiece model: {error}") from error
        size: int = self._model.vocab_size()
        self._size = size
        self._added = {token_id: text for token_id, text in added.items() if token_id >= size}
        self._id_of = {text: token_id for token_id, text in self._added.items()}
        own = [i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self.special_ids = frozenset([*own, *(i for i in special if i in self._added)])
        self.vocab_size = max([size - 1, *self._added]) + 1
        self._cut = split_at([*self._id_of, *map(self._model.id_to_piece, own)])
        self._cut_plain = split_at(
            text for text, token_id in self._id_of.items() if token_id not in self.special_ids
        )
        self._prefix = [self._model.bos_id()] if add_bos and self._model.bos_id() >= 0 else []
        self._suffix = [self._model.eos_id()] if add_eos and self._model.eos_id() >= 0 else []
        first = self._model.encode("a", out_type=str)[0]
        self.drops_leading_space = first.startswith(SPACE_PIECE)
        named = {
            "bos_token": self._model.bos_id(),
            "eos_token": self._model.eos_id(),
            "unk_token": self._model.unk_id(),
            "pad_token": self._model.pad_id(),
        }
        self.named_tokens = {  # the model's own; -1 stands for none
            name: self._model.id_to_piece(i) for name, i in named.items() if i >= 0
        }

    def piece(self, token_id: int) -> str | None:
        if 0 <= token_id < self._size:
            piece: str = self._model.id_to_piece(token_id)
            return piece
        return self._added.get(token_id)

    def piece_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        if token_id >= self._size or token_id in self.special_ids:
            return piece.encode()
        if self._model.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE_PIECE, " ").encode()

    def piece_id(self, piece: str) -> int | None:
        if piece in self._id_of:
            return self._id_of[piece]
        token_id: int = self._model.piece_to_id(piece)
        known = token_id != self._model.unk_id() or self._model.id_to_piece(token_id) == piece
        return token_id if known else None

    def encode(self, text: str, *, with_affixes: bool) -> list[int]:
        ids = self._encode_parts(text, self._cut, at_start=True)
        return [*self._prefix, *ids, *self._suffix] if with_affixes else ids

    def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        return self._encode_parts(text, self._cut_plain, at_start=at_start)

    def _encode_parts(self, text: str, cut: re.Pattern[str] | None, *, at_start: bool) -> list[int]:
        """Encode, each string of `cut` as its own id. Only a text's start gets the dummy space."""
        ids: list[int] = []
        for index, part in enumerate(cut.split(text) if cut is not None else [text]):
            if index % 2:
                token_id = self.piece_id(part)
                assert token_id is not None
                ids.append(token_id)
            elif part:
                model = self._model if at_start and index == 0 else self._bare
                ids.extend(model.encode(part))
        return ids

"""The SentencePiece library behind the Protocol of `penstock.text.backends`.

Owns how tokens that the model's file does not hold are put around those that it does. Knows no
configuration files. Invariant: text between such tokens is encoded as the library does it, with the
space that it puts in front only where the text begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from penstock.text.backends import SPACE_PIECE, encoding, loading, split_at
from penstock.text.directory import read_bytes


class SentencePieceBackend:
    """A SentencePiece model, with the tokens a Hugging Face configuration adds to it.

    Args:
        added: strings of the tokens that the configuration names, by id; they are split off
            before the model sees a text, and so are the model's own control pieces. What the model
            has under such an id is a placeholder.
        special: those of them that are no text.
        named: strings of special tokens, whose ids the model has if no one else.
        proto: the serialized model, where it is not the content of `path`.
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
        named: Iterable[str],
        add_bos: bool,
        add_eos: bool,
        proto: bytes | None = None,
    ) -> None:
        import sentencepiece

        proto = read_bytes(path) if proto is None else proto
        with loading(path, "SentencePiece model"):
            model = self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + self._NO_PREFIX)
            pieces: list[str] = model.id_to_piece(list(range(model.vocab_size())))
            first = model.encode("a", out_type=str)[0]
        self.drops_leading_space = first.startswith(SPACE_PIECE)
        size = len(pieces)
        texts = frozenset(named)
        self._added = {i: piece for i, piece in enumerate(pieces) if piece in texts} | dict(added)
        self._pieces = dict(enumerate(pieces)) | self._added
        self._id_of = {text: token_id for token_id, text in self._added.items()}
        own = [i for i in range(size) if model.is_control(i) or model.is_unknown(i)]
        marked = (i for i, text in self._added.items() if text in texts)
        self.special_ids = frozenset([*own, *special, *marked])
        self.vocab_size = max([size - 1, *self._added]) + 1
        self._cut = split_at([*self._id_of, *(self._pieces[i] for i in own)])
        self._cut_plain = split_at(  # the special ones only if the model itself finds them
            text
            for text, token_id in self._id_of.items()
            if token_id not in self.special_ids
            or (token_id not in own and model.piece_to_id(text) == token_id)
        )
        self._prefix = [model.bos_id()] if add_bos and model.bos_id() >= 0 else []
        self._suffix = [model.eos_id()] if add_eos and model.eos_id() >= 0 else []

    @property
    def named_tokens(self) -> dict[str, str]:
        """The model's own special tokens by the names that configurations use."""
        model = self._model
        ids = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
            "pad_token": model.pad_id(),
        }
        return {name: self._pieces[i] for name, i in ids.items() if i >= 0}  # -1 stands for none

    def piece(self, token_id: int) -> str | None:
        return self._pieces.get(token_id)

    def piece_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        if token_id in self._added or token_id in self.special_ids:
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
        ids = self._encode_parts(text, self._cut, True)
        return [*self._prefix, *ids, *self._suffix] if with_affixes else ids

    def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        return self._encode_parts(text, self._cut_plain, at_start, plain=True)

    def _encode_parts(
        self, text: str, cut: re.Pattern[str] | None, at_start: bool, *, plain: bool = False
    ) -> list[int]:
        """Encode, each string of `cut` as its own id. Only a text's start gets the dummy space.

        Args:
            plain: a special string is broken instead, so that the model does not find it.
        """
        ids: list[int] = []
        for index, part in enumerate(cut.split(text) if cut is not None else [text]):
            if index % 2:
                token_id = self.piece_id(part)
                assert token_id is not None
                if not plain or token_id not in self.special_ids:
                    ids.append(token_id)
                    continue
            model = self._model if at_start and index == 0 else self._bare
            for piece in (part[:1], part[1:]) if index % 2 else (part,):
                with encoding():
                    ids.extend(model.encode(piece))
        return ids

"""The tokenizer and the chat templates in the metadata of a GGUF file.

Owns the keys `tokenizer.*` (llama.cpp's `docs` and `llama-vocab.cpp` are their source) and what is
built of them: byte-level BPE ("gpt2") and WordPiece ("bert") by the `tokenizers` library, and
SentencePiece's BPE ("llama") by that library itself, out of a model that is put together here.
Knows no model. Invariant: token number i of the file has the id i.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.gguf.header import shown
from penstock.gguf.metadata import Metadata
from penstock.gguf.reader import open_gguf
from penstock.text.backends import Backend, HuggingFaceBackend
from penstock.text.directory import MAX_TOKEN_ID
from penstock.text.gguf_pretokenizers import RULES
from penstock.text.sentencepiece_backend import SentencePieceBackend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ggml's and SentencePiece's
_NAMES = {  # of transformers, and ggml's keys for the ids
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_PRE_OF = {  # by ggml's architecture
    "command-r": "command-r",
    "falcon": "falcon",
    "gpt2": "gpt-2",
    "gptneox": "gpt-neox",
    "mpt": "mpt",
    "refact": "refact",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
}
_SPACE = "\u2581"
_MOST_LETTERS = 100  # of a word that WordPiece looks up


class Found(NamedTuple):
    """What `penstock.text.tokenizer.Tokenizer` is made of."""

    backend: Backend
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


class _Vocabulary(NamedTuple):
    """The tokens of a file, as every kind of tokenizer needs them."""

    told: Metadata  # below `tokenizer.ggml.`
    tokens: list[str]
    types: list[int]
    named: dict[str, int]  # ids by transformers' names
    architecture: str  # ggml's

    def of(self, *types: int) -> dict[int, str]:
        """Tokens of these types, by id."""
        return {i: self.tokens[i] for i, kind in enumerate(self.types) if kind in types}

    def affixes(self, *, bos: bool, eos: bool) -> tuple[int | None, int | None]:
        """What stands around a text, unless the file says otherwise."""
        first = self.told.flag("add_bos_token", bos)
        last = self.told.flag("add_eos_token", eos)
        return (
            self.named.get("bos_token") if first else None,
            self.named.get("eos_token") if last else None,
        )


def load_gguf(path: Path) -> Found:
    """Make the tokenizer of a GGUF file.

    Raises:
        ModelLoadError: the file is damaged, or its metadata makes no tokenizer.
        UnsupportedModel: the tokenizer is of a kind that is not known.
    """
    file = open_gguf(path)
    whole = Metadata(file.files[0], file.metadata)
    told = whole.under("tokenizer.ggml.")
    kind = told.text("model")
    make = _MAKERS.get(kind)
    if make is None:
        raise UnsupportedModel(
            f"`tokenizer.ggml.model` is `{shown(kind)}` in `{file.files[0]}`, which is not known.",
            hint=f"known are {', '.join(f'`{name}`' for name in sorted(_MAKERS))}.",
        )
    vocabulary = _vocabulary(told, whole.text("general.architecture", ""))
    if "tokenizer.huggingface.json" in whole:
        make = partial(_published, whole.text("tokenizer.huggingface.json"))
    backend = make(file.files[0], vocabulary)
    named = {name: vocabulary.tokens[token_id] for name, token_id in vocabulary.named.items()}
    return Found(backend, named, _chat_templates(whole))


def _vocabulary(told: Metadata, architecture: str) -> _Vocabulary:
    tokens = told.strings("tokens")
    types = told.integers("token_type", [NORMAL] * len(tokens))
    if not 0 < len(tokens) <= MAX_TOKEN_ID:
        raise told.error("tokens", f"`1` to `{MAX_TOKEN_ID}` strings")
    if len(types) != len(tokens):
        raise told.error("token_type", f"`{len(tokens)}` integers, one for each token")
    named = {}
    for name, key in _NAMES.items():
        if key in told:
            named[name] = told.integer(key)
            if named[name] >= len(tokens):
                raise told.error(key, f"below the number of tokens, `{len(tokens)}`")
    return _Vocabulary(told, tokens, types, named, architecture)


def _chat_templates(whole: Metadata) -> dict[str, str]:
    names = whole.strings("tokenizer.chat_templates", [])
    found = {name: whole.text(f"tokenizer.chat_template.{name}") for name in names}
    if "tokenizer.chat_template" in whole:
        found["default"] = whole.text("tokenizer.chat_template")
    return found


def _published(content: str, file: Path, vocabulary: _Vocabulary) -> Backend:
    """The whole `tokenizer.json`, which a file may hold beside what was made of it."""

    def build() -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_str(content)

    return HuggingFaceBackend(file, build)


# Byte-level BPE.


def _byte_level(file: Path, vocabulary: _Vocabulary) -> Backend:
    told = vocabulary.told
    name = told.text("pre", "default")
    if name == "default":  # files of before 2024-05 do not tell; of some models there is one kind
        name = _PRE_OF.get(vocabulary.architecture, name)
    rule = RULES.get(name)
    if rule is None:
        raise UnsupportedModel(
            f"`tokenizer.ggml.pre` is `{shown(name)}` in `{file}`: how that cuts text is unknown.",
            hint=f"convert the model again; known are {', '.join(sorted(RULES))}.",
        )
    merges = [_pair(merge, told) for merge in told.strings("merges")]
    affixes = vocabulary.affixes(bos=rule.adds_bos, eos=False)
    adds_space = told.flag("add_space_prefix", False)

    def build() -> Any:
        import tokenizers
        from tokenizers import decoders, models, normalizers

        library = tokenizers.Tokenizer(
            models.BPE(vocab=_by_text(vocabulary), merges=merges, ignore_merges=rule.takes_words)
        )
        if rule.is_composed:
            library.normalizer = normalizers.NFC()
        library.pre_tokenizer = rule.pre_tokenizer(add_prefix_space=adds_space)
        library.decoder = decoders.ByteLevel()
        return _finished(library, vocabulary, affixes)

    return HuggingFaceBackend(file, build)


def _pair(merge: str, told: Metadata) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise ModelLoadError(
            f"`tokenizer.ggml.merges` in `{told.file}` has `{shown(merge)}`, which is no pair."
        )
    return left, right


def _by_text(vocabulary: _Vocabulary) -> dict[str, int]:
    """Ids by token; of tokens that are there twice, the first. Unused ones stand for no text."""
    found: dict[str, int] = {}
    for token_id, token in enumerate(vocabulary.tokens):
        if vocabulary.types[token_id] != UNUSED:
            found.setdefault(token, token_id)
    return found


def _finished(library: Any, vocabulary: _Vocabulary, affixes: tuple[int | None, int | None]) -> Any:
    """Add the tokens that are found in a text as they stand, and what stands around it."""
    import tokenizers
    from tokenizers import processors

    library.add_tokens(
        [
            tokenizers.AddedToken(token, special=False, normalized=False)
            for token in vocabulary.of(USER_DEFINED).values()
            if token
        ]
    )
    library.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in vocabulary.of(CONTROL, UNKNOWN).values()
            if token
        ]
    )
    first, last = ([] if i is None else [vocabulary.tokens[i]] for i in affixes)
    library.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(vocabulary.tokens[i], i) for i in {*affixes} if i is not None],
    )
    return library


# WordPiece. Of two tokens, "##ing" and "word", the file has "ing" and "▁word".


def _word_piece(file: Path, vocabulary: _Vocabulary) -> Backend:
    marks = (CONTROL, UNKNOWN)  # are there as they are written
    pieces = [
        token if kind in marks else token[1:] if token.startswith(_SPACE) else f"##{token}"
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    spelt = vocabulary._replace(tokens=pieces)
    named = dict(vocabulary.named)
    known = {piece: token_id for token_id, piece in reversed([*enumerate(pieces)])}
    for name, text in (("cls_token", "[CLS]"), ("sep_token", "[SEP]"), ("unk_token", "[UNK]")):
        if text in known:
            named.setdefault(name, known[text])
    unknown = pieces[named.get("unk_token", 0)]
    is_lowered = vocabulary.told.flag("normalizer.lowercase", True)
    first = named.get("cls_token", named.get("bos_token"))
    affixes = (first, named.get("sep_token", named.get("eos_token")))

    def build() -> Any:
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        library = tokenizers.Tokenizer(
            models.WordPiece(
                vocab=_by_text(spelt),
                unk_token=unknown,
                max_input_chars_per_word=_MOST_LETTERS,
            )
        )
        library.normalizer = normalizers.BertNormalizer(lowercase=is_lowered)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece(cleanup=False)
        return _finished(library, spelt, affixes)

    vocabulary.named.update(named)
    return HuggingFaceBackend(file, build)


# SentencePiece. Its models are messages of protobuf (`sentencepiece_model.proto`); the few fields
# that are needed are written here.


def _sentencepiece(file: Path, vocabulary: _Vocabulary) -> Backend:
    told = vocabulary.told
    scores = told.numbers("scores")
    if len(scores) != len(vocabulary.tokens):
        raise told.error("scores", f"`{len(vocabulary.tokens)}` numbers, one for each token")
    if len({scores[i] for i in vocabulary.of(NORMAL)}) == 1:
        raise UnsupportedModel(
            f"`tokenizer.ggml.scores` in `{file}` are all the same: which tokens are joined first "
            "is not told.",
            hint="convert the model again, with its `tokenizer.model`.",
        )
    vocabulary = vocabulary._replace(types=_piece_types(vocabulary))
    first, last = vocabulary.affixes(bos=True, eos=False)
    return SentencePieceBackend(
        file,
        proto=b"".join(_model(vocabulary, scores)),
        added={i: text for i, text in vocabulary.of(USER_DEFINED).items() if text},
        special=[],
        named=[vocabulary.tokens[i] for i in vocabulary.named.values()],
        add_bos=first is not None,
        add_eos=last is not None,
    )


def _piece_types(vocabulary: _Vocabulary) -> list[int]:
    """The types as the library wants them: one piece is unknown, and both ends are control."""
    types, named = list(vocabulary.types), vocabulary.named
    unknown = named.get("unk_token", next(iter(vocabulary.of(UNKNOWN)), None))
    for token_id in vocabulary.of(UNKNOWN):
        types[token_id] = UNUSED  # converters mark padding so
    for name in ("bos_token", "eos_token"):
        if name in named:
            types[named[name]] = CONTROL
    if unknown is not None:
        types[unknown] = UNKNOWN
    return types


def _model(vocabulary: _Vocabulary, scores: list[float]) -> Iterator[bytes]:
    """The message of a model."""
    for number, (text, kind, score) in enumerate(
        zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
    ):
        if kind == USER_DEFINED or not text:  # what is not the model's to find
            text, kind = f"<unused token {number}>", UNUSED
        piece = _text(1, text) + b"\x15" + struct.pack("<f", score) + _integer(3, kind)
        yield _message(1, piece)
    has_bytes = sum(kind == BYTE for kind in vocabulary.types) == 256
    trainer = _integer(3, 2) + _integer(35, int(has_bytes))
    for field, name in ((45, "unk_token"), (46, "bos_token"), (47, "eos_token"), (48, "pad_token")):
        token_id = vocabulary.named.get(name)
        if name == "unk_token":
            token_id = next(iter(vocabulary.of(UNKNOWN)), None)
        trainer += _text(field, "" if token_id is None else vocabulary.tokens[token_id])
    yield _message(2, trainer)
    told = vocabulary.told
    yield _message(
        3,
        _text(1, "identity")
        + _integer(3, int(told.flag("add_space_prefix", True)))
        + _integer(4, int(told.flag("remove_extra_whitespaces", False)))
        + _integer(5, 1),
    )


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


_MAKERS: dict[str, Callable[[Path, _Vocabulary], Backend]] = {
    "bert": _word_piece,
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}

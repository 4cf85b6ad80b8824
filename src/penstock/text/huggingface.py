"""Tokenizers of the `tokenizers` library, made of the files that it has been published in.

Owns what a configuration adds to such a file: tokens, and what stands around a text. How the
result encodes is the business of `penstock.text.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.text.backends import BYTE_LETTERS, HuggingFaceBackend
from penstock.text.directory import TokenizerSettings, check_size, read_json

VOCABULARY, MERGES = "vocab.json", "merges.txt"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token, where its configuration names none
GPT2_CLASSES = frozenset({"GPT2Tokenizer", "GPT2TokenizerFast"})


def from_tokenizer_json(file: Path, settings: TokenizerSettings) -> HuggingFaceBackend:
    """A `tokenizer.json`, with the tokens that only the files beside it know.

    As in transformers, `add_bos_token` of the configuration does not count here.
    """
    import tokenizers

    def build() -> Any:
        check_size(file)
        library = tokenizers.Tokenizer.from_file(str(file))
        _add_tokens(library, settings)
        return library

    return HuggingFaceBackend(file, build)


def from_vocabulary(file: Path, settings: TokenizerSettings) -> HuggingFaceBackend:
    """GPT-2's `vocab.json`, with the `merges.txt` beside it.

    Raises:
        ModelLoadError: one of the files is missing or broken.
        UnsupportedModel: they belong to another class of tokenizers than GPT-2's.
    """
    merges = file.with_name(MERGES)
    if settings.tokenizer_class not in {None, *GPT2_CLASSES}:  # others cut words in other ways
        raise UnsupportedModel(
            f"`{file.parent}` has no `tokenizer.json`, and is of the class "
            f"`{settings.tokenizer_class}`, whose `{VOCABULARY}` is not read.",
            hint="`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes that file.",
        )
    if not merges.is_file():
        raise ModelLoadError(f"`{file}` is of no use without `{merges}`, which is missing.")
    vocabulary = read_json(file)
    if not all(type(token_id) is int for token_id in vocabulary.values()):
        raise ModelLoadError(f"`{file}` gives a token an id that is no number.")
    if missing := BYTE_LETTERS - vocabulary.keys():
        raise ModelLoadError(
            f"`{file}` is no byte-level vocabulary: `{len(missing)}` of `256` bytes have no token."
        )
    return HuggingFaceBackend(file, _gpt2(file, merges, settings))


def _gpt2(file: Path, merges: Path, settings: TokenizerSettings) -> Callable[[], Any]:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    def build() -> Any:
        check_size(merges)
        library = tokenizers.Tokenizer(models.BPE.from_file(str(file), str(merges)))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space)
        library.decoder = decoders.ByteLevel()
        _add_tokens(library, settings)
        around = [("bos_token", settings.add_bos), ("eos_token", settings.add_eos)]
        texts = {name: settings.named[name] for name, wanted in around if wanted}
        known = {text: i for text in texts.values() if (i := library.token_to_id(text)) is not None}
        parts = [texts.get("bos_token"), "$A", texts.get("eos_token")]
        library.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part in {"$A", *known}],
            special_tokens=list(known.items()),
        )
        return library

    return build


def _add_tokens(library: Any, settings: TokenizerSettings) -> None:
    """Add what the configuration knows and the library does not, as transformers does.

    Special strings that no file gives an id stay text: the model has no row for them.
    """
    import tokenizers

    known = library.get_added_tokens_decoder()
    tokens = {
        token.content: token
        for token_id, token in sorted(settings.added.items())
        if token_id not in known
    }
    library.add_tokens([tokenizers.AddedToken(**token._asdict()) for token in tokens.values()])
    taken = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in settings.special
            if text not in taken and library.token_to_id(text) is not None
        ]
    )

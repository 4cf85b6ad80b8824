"""Tokenizers for the tests: tiny ones made here, the built-in one, and real ones where present."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

import penstock
from penstock.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "for i in range(10): print(i, 'naïve café', \"日本語\")\n\tпривет мир 😀 é ñ ü",
    "hello hello hello world world, the cat and the hat; STOP now, stopping.\n\n",
] * 4
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<s>"]
BYTE_LEVEL = ["tiny-bytes", "brook", "gpt2", "pythia"]
SPACED = ["tiny-llama", "tiny-sentencepiece", "mistral-v1", "mistral-v3"]
REAL = {
    "gpt2": "tokenizer-gpt2",
    "pythia": "tokenizer-pythia",
    "mistral-v1": "tokenizer-mistral/data/tokenizer.model.v1",
    "mistral-v3": "tokenizer-mistral/data/mistral_instruct_tokenizer_240323.model.v3",
}


def make_bytes(path: Path) -> Path:
    """A byte-level BPE, as GPT-2 and Llama 3 have it."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([AddedToken("<think>", special=False), "<é>"])
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "chat_template": "{{ 1 }}"}'
    )
    return path


def make_llama(path: Path) -> Path:
    """A BPE with "▁" for spaces and byte fallback, as Llama 2's tokenizer.json has it."""
    library = Library(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.save(str(path / "all.json"))
    content = json.loads((path / "all.json").read_text("utf-8"))
    content["added_tokens"] = content["added_tokens"][: len(SPECIALS) + 1]  # bytes are no specials
    (path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|end|>"}')
    return path


def make_sentencepiece(path: Path, **options: Any) -> Path:
    """A SentencePiece model, with two tokens that only the configuration knows."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines() if line]),
        model_prefix=str(path / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=9,
        **options,
    )
    (path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"420": {"content": "<|user|>", "special": true},'
        ' "421": {"content": "<think>", "special": false}}}'
    )
    return path


_MAKERS = {
    "tiny-bytes": make_bytes,
    "tiny-llama": make_llama,
    "tiny-sentencepiece": make_sentencepiece,
}


class Loaded(NamedTuple):
    """A tokenizer and the directory or file it came from."""

    name: str
    path: Path
    tokenizer: Tokenizer


_LOADED: dict[str, Loaded] = {}


def load(name: str, factory: pytest.TempPathFactory) -> Loaded:
    """The tokenizer of that name, loaded once; skips the test where it is not there."""
    if name not in _LOADED:
        path = _find(name, factory)
        _LOADED[name] = Loaded(name, path, load_tokenizer(path))
    return _LOADED[name]


def _find(name: str, factory: pytest.TempPathFactory) -> Path:
    if name in _MAKERS:
        return _MAKERS[name](factory.mktemp(name))
    if name == "brook":
        path = Path(penstock.__file__).parent / "builtin" / "brook"
        if not (path / "tokenizer.json").is_file():
            pytest.skip("the built-in model is not there")
        return path
    root = os.environ.get("PENSTOCK_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("PENSTOCK_DATA does not name the data directory")
    return Path(root) / REAL[name]


@pytest.fixture(scope="session", params=BYTE_LEVEL)
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Each byte-level tokenizer that is there."""
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=SPACED)
def spaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Each tokenizer that hides a leading space, and is there."""
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=BYTE_LEVEL + SPACED)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Each tokenizer that is there."""
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer that is always there."""
    return load("tiny-bytes", tmp_path_factory).tokenizer


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that hides a leading space, always there."""
    return load("tiny-llama", tmp_path_factory).tokenizer

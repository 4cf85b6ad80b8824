"""Published tokenizers and chat templates of the data, and what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from penstock.text.tokenizer import Tokenizer, load_tokenizer

MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
}


@cache
def byte_level(data: Path, name: str, directory: Path) -> tuple[Tokenizer, Any]:
    """Ours and transformers' tokenizer of a directory."""
    folder, files = {
        "gpt2": ("tokenizer-gpt2", ["tokenizer.json"]),
        "gpt2-vocabulary": ("tokenizer-gpt2", ["vocab.json", "merges.txt"]),
        "pythia": ("tokenizer-pythia", ["tokenizer.json", "tokenizer_config.json"]),
    }[name]
    path = directory / name
    path.mkdir()
    for file in files:
        shutil.copy(data / folder / file, path)
    if name != "pythia":
        config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path), AutoTokenizer.from_pretrained(path)


@cache
def mistral(data: Path, version: str) -> tuple[Tokenizer, Any, Any]:
    """Ours, transformers', and the SentencePiece library's own.

    transformers reads a .model with protobuf, which need not be there: here it is given the pieces.
    Merges are ordered by the scores, as in published tokenizer.json files. (From a .model,
    transformers 5 orders them by id, and then cuts runs of spaces otherwise than SentencePiece.)
    """
    file = data / "tokenizer-mistral" / "data" / MISTRAL[version]
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    scores = {piece: model.get_score(i) for piece, i in vocabulary.items()}
    control = [model.id_to_piece(i) for i in range(model.vocab_size()) if model.is_control(i)]
    reference = LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores),
        extra_special_tokens=control,
        add_bos_token=True,
    )
    return load_tokenizer(file), reference, model


@cache
def published(data: Path) -> list[tuple[str, str]]:
    """(file, source) of every published template in the data."""
    found: list[tuple[str, str]] = []
    for folder in ("chat-templates", "tokenizer-mistral/chat_templates"):
        for file in sorted((data / folder).rglob("*.jinja")):
            found.append((file.name, file.read_text("utf-8")))
    for file in sorted((data / "chat-templates" / "mistral.rs").glob("*.json")):
        found.append((file.name, json.loads(file.read_text("utf-8"))["chat_template"]))
    return list({source: (file, source) for file, source in found}.values())

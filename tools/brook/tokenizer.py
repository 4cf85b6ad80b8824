"""Trains brook's tokenizer: byte-level BPE, written as a Hugging Face `tokenizer.json`.

Pieces of a word exist only where a word starts with a space or a capital letter. A lower-case
letter that follows a quote, an underscore or nothing at all is a token of its own, and so is every
digit. String tasks (`Reverse "lamp".`) and numbers are therefore seen letter by letter and digit by
digit, which a model of this size can learn, while running text stays short.

Run: python -m brook.tokenizer OUT_DIR
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import BOS, END, PAD, SPECIAL_TOKENS, TEMPLATE, TOOL_CALL, Conversation, segments
from .data import conversation

VOCAB_SIZE = 2048
PATTERN = r" ?[A-Z][a-z]+| [a-z]+| ?[A-Z]|[a-z]|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s"


def corpus(count: int, seed: int) -> Iterator[str]:
    """Text of generated conversations."""
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(count):
        parts: Conversation = conversation(rng, 4)
        yield from (part.text for part in segments(parts) if not part.special)


def train(count: int = 20000, seed: int = 0) -> Tokenizer:
    """The tokenizer, from `count` conversations of the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(count, seed), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    written = json.loads(tokenizer.to_str())
    for token in written["added_tokens"]:  # a tool call must survive decoding without specials
        token["special"] = token["content"] != TOOL_CALL
    text = json.dumps(written, indent=2, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [
            token for token in SPECIAL_TOKENS if token not in (BOS, END, PAD, TOOL_CALL)
        ],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    save(train(), Path(sys.argv[1]))

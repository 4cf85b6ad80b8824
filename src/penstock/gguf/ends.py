"""Which tokens end an answer, by the metadata of a GGUF file.

Owns the list of strings that do so wherever they are tokens: files name one end only, and templates
use another (llama.cpp's `llama-vocab.cpp` has the same list for the same reason). Knows no model.
"""

from __future__ import annotations

from penstock.gguf.metadata import Metadata

_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_STRINGS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    }
)
_HARMONY = {"<|return|>", "<|call|>"}  # where both are, "<|end|>" ends a message, not the answer


def end_ids(told: Metadata) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, first the one that the file calls so; each once.

    Args:
        told: the metadata of the whole file.

    Raises:
        ModelLoadError: a key of them holds no id of the vocabulary.
    """
    vocabulary = told.under("tokenizer.ggml.")
    tokens = vocabulary.strings("tokens", [])
    named = []
    for key in _KEYS:
        if key in vocabulary:
            named.append(vocabulary.integer(key))
            if tokens and named[-1] >= len(tokens):
                raise vocabulary.error(key, f"below the number of tokens, `{len(tokens)}`")
    strings = _STRINGS
    if set(tokens) >= _HARMONY:
        strings = strings - {"<|end|>"}
    found = [token_id for token_id, token in enumerate(tokens) if token in strings]
    return tuple(dict.fromkeys([*named, *found]))

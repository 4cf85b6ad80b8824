"""Small checkpoints of models that pool, with tokenizers, as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = [
    *("the", "a", "fox", "dog", "river", "is", "was", "quick", "brown"),
    *("cold", "warm", "and", "runs", "over", "jumps", "water", "bank"),
]
HIDDEN = 48
_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}


def bert_tokenizer() -> Any:
    """WordPiece with BERT's pairs."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    letters = "abcdefghijklmnopqrstuvwxyz.,?!"
    pieces += [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    library = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, **{f"{name}_token": text for name, text in names.items()}
    )


def roberta_tokenizer() -> Any:
    """Words with RoBERTa's pairs, whose second text has no type of its own."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in WORDS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def causal_tokenizer() -> Any:
    """Words with an end-of-text token behind a text, as Qwen3's embedding models have it."""
    pieces = ["<|endoftext|>", "<unk>", *(f"\u2581{word}" for word in WORDS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>",
        pair="$A $B:1 <|endoftext|>:1",
        special_tokens=[("<|endoftext|>", 0)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def save(path: Path, kind: str, tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of random weights with its tokenizer, saved at `path`."""
    torch.manual_seed(seed)
    cls = getattr(transformers, kind)
    if kind.startswith("Qwen3"):
        changes = {"num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0} | changes
    if "Roberta" in kind:
        changes = {"pad_token_id": 1, "type_vocab_size": 1} | changes
    model = cls(cls.config_class(vocab_size=len(tokenizer), **_SIZES | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def add_modules(
    path: Path,
    mode: str = "mean_tokens",
    *,
    normalise: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    max_len: int | None = None,
) -> None:
    """The files of sentence-transformers beside a checkpoint."""
    types = ["Transformer", "Pooling"] + ["Normalize"] * normalise
    folders = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": folders[i], "type": f"sentence_transformers.models.{t}"}
        for i, t in enumerate(types)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    modes += ("weightedmean_tokens", "lasttoken")
    config: dict[str, Any] = {f"pooling_mode_{name}": name == mode for name in modes}
    config |= {"word_embedding_dimension": HIDDEN, "include_prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if max_len is not None:
        settings = {"max_seq_length": max_len, "do_lower_case": False}
        (path / "sentence_bert_config.json").write_text(json.dumps(settings))
    settings = {"prompts": prompts or {}, "default_prompt_name": default_prompt}
    (path / "config_sentence_transformers.json").write_text(json.dumps(settings))


def change_config(path: Path, **changes: Any) -> None:
    """Set keys of a checkpoint's config."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

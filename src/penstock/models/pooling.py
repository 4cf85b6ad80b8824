"""How a checkpoint pools: what becomes of the hidden states of a text, and what stands beside it.

Owns the reading of sentence-transformers' files (`modules.json`, `1_Pooling/config.json`,
`sentence_bert_config.json`, `config_sentence_transformers.json`), of a GGUF file's pooling type and
of what a config says of scores; and the formulas. Knows no engine. Imports no torch.
Invariant: a module or a mode that would change the result and is not here is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.models.config import ConfigReader
from penstock.models.files import is_gguf, read_json
from penstock.models.spec import ModelSpec

F32 = NDArray[np.float32]
Kind = Literal["cls", "mean", "max", "mean_sqrt_len", "last"]
ScoreActivation = Literal["identity", "sigmoid", "softmax"]

# Modes of sentence-transformers' Pooling module, old (a flag each) and new (one name).
_MODES: dict[str, Kind | None] = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "lasttoken": "last",
    "weightedmean_tokens": None,
}
_NAMES: dict[str, Kind] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "lasttoken": "last",
}
_GGUF_KINDS: dict[str, Kind] = {"mean": "mean", "cls": "cls", "last": "last"}
_MODULES = "modules.json"
_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
_MAX_PROMPTS, _MAX_PROMPT_CHARS = 1024, 64 * 2**10
_MAX_DIMENSIONS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingSpec:
    """From the hidden states [n, hidden] of a text to the vector that is its answer."""

    kind: Kind
    is_normalised: bool = False  # to a length of 1
    max_len: int | None = None  # tokens of a text that the checkpoint was made for, if it says so
    # To how many of its first numbers an embedding may be cut (Matryoshka representation learning,
    # Kusupati et al. 2022); (): to any number; None: to none.
    dimensions: tuple[int, ...] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)  # put before a text, by name
    default_prompt: str | None = None  # the name of the one that is put if none is named
    is_lowercased: bool = False  # texts are, prompts included, before they are tokenized
    activation: ScoreActivation = "identity"  # of a classifier's scores
    labels: tuple[str, ...] = ()  # their names
    source: str = ""  # who says so, for people


def has_modules(path: Path) -> bool:
    """Whether a checkpoint is one of sentence-transformers."""
    return not is_gguf(path) and (path / _MODULES).is_file()


def read_pooling(path: Path, spec: ModelSpec, config: Mapping[str, Any]) -> PoolingSpec:
    """How the checkpoint at `path`, with this spec and config, pools.

    What nothing says is what vLLM takes: the first token of encoders, the last of other models, and
    embeddings of length 1.

    Raises:
        UnsupportedModel: it pools in a way that is not implemented; the message names it.
        ModelLoadError: a file is damaged.
    """
    reader = ConfigReader(config)
    if config.get("is_causal") is False and not spec.is_encoder:
        raise reader.error("is_causal", "absent, because queries would have to see later tokens")
    default: Kind = "cls" if spec.arrangement == "encoder" else "last"
    if spec.classifier is not None:
        num_labels = spec.classifier.num_labels
        return PoolingSpec(
            kind=default,
            activation=_activation(config, num_labels),
            labels=_labels(config, num_labels),
            source="its classifier",
        )
    dimensions = _dimensions(config, spec.hidden_size, reader)
    if is_gguf(path):
        kind = str(config.get("pooling_type", "none"))
        if kind == "rank":
            raise UnsupportedModel(f"`pooling_type` is `rank` in `{path}`, which is not read.")
        return PoolingSpec(
            kind=_GGUF_KINDS.get(kind, default),
            is_normalised=True,
            dimensions=dimensions,
            source=f"`pooling_type` {kind}",
        )
    if not has_modules(path):
        return PoolingSpec(
            kind=default, is_normalised=True, dimensions=dimensions, source="its architecture"
        )
    return _read_modules(path, spec, dimensions)


def _read_modules(path: Path, spec: ModelSpec, dimensions: tuple[int, ...] | None) -> PoolingSpec:
    """What sentence-transformers' files say."""
    kinds, folder = _modules(path / _MODULES)
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedModel(
            f"`{path / _MODULES}` has the modules {', '.join(f'`{kind}`' for kind in kinds)}; read "
            "are `Transformer`, `Pooling` and perhaps `Normalize`, in this order."
        )
    settings = ConfigReader(read_json(path / "sentence_bert_config.json") or {})
    prompts, default_prompt = _prompts(path / "config_sentence_transformers.json")
    return PoolingSpec(
        kind=_kind(path / folder / "config.json", spec.hidden_size),
        is_normalised=kinds[2:] == ["Normalize"],
        max_len=settings.optional("max_seq_length", None),
        dimensions=dimensions,
        prompts=prompts,
        default_prompt=default_prompt,
        is_lowercased=settings.flag("do_lower_case"),
        source=f"`{folder}/config.json`",
    )


def _modules(file: Path) -> tuple[list[str], str]:
    """The kinds of the modules in order, and the folder of the second."""
    try:
        modules = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"`{file}` cannot be read: {error}.") from error
    good = isinstance(modules, list) and all(
        isinstance(module, dict)
        and isinstance(module.get("type"), str)
        and isinstance(module.get("path"), str)
        for module in modules
    )
    if not good or not modules or len(modules) > 64:
        raise ModelLoadError(f"`{file}` is no list of modules, each with a `type` and a `path`.")
    kinds = [module["type"].rpartition(".")[2][:64] for module in modules]
    folder = modules[1]["path"] if len(modules) > 1 else ""
    if folder and not _FOLDER.fullmatch(folder):
        raise ModelLoadError(f"`{file}` names a folder that is not one of the model's own.")
    if modules[0]["path"]:
        raise UnsupportedModel(
            f"`{file}` has its weights in the folder `{modules[0]['path'][:80]!a}`, which is not "
            "read.",
            hint="save it again with a newer sentence-transformers.",
        )
    return kinds, folder


def _kind(file: Path, hidden_size: int) -> Kind:
    """The mode of a Pooling module."""
    config = read_json(file)
    if config is None:
        raise ModelLoadError(f"`{file}` is missing.")
    reader = ConfigReader(config)
    reader.expect("word_embedding_dimension", hidden_size)
    reader.expect("embedding_dimension", hidden_size)
    reader.expect("include_prompt", True)
    if reader.has("pooling_mode"):
        name = config["pooling_mode"]
        if not isinstance(name, str) or name not in _NAMES:
            raise reader.error("pooling_mode", f"one of {', '.join(sorted(_NAMES))}")
        return _NAMES[name]
    chosen = [name for name in _MODES if reader.flag(f"pooling_mode_{name}")]
    if len(chosen) != 1 or (kind := _MODES[chosen[0]]) is None:
        told = ", ".join(f"`pooling_mode_{name}`" for name in chosen) or "no mode"
        raise UnsupportedModel(
            f"`{file}` asks for {told}; it must be one of "
            f"{', '.join(name for name, kind in _MODES.items() if kind)}."
        )
    return kind


def _prompts(file: Path) -> tuple[dict[str, str], str | None]:
    """Texts that are put before others, by name, and the name of the usual one."""
    reader = ConfigReader(read_json(file) or {})
    reader.expect("similarity_fn_name", "cosine", "dot")  # of lengths of 1 they are the same
    prompts = reader.value(dict, "prompts", {})
    size = sum(len(str(key)) + len(str(value)) for key, value in prompts.items())
    is_text = all(isinstance(value, str) for value in prompts.values())
    if not is_text or len(prompts) > _MAX_PROMPTS or size > _MAX_PROMPT_CHARS:
        raise reader.error("prompts", f"texts by name, of `{_MAX_PROMPT_CHARS}` characters in all")
    default = reader.value(str, "default_prompt_name", "") or None
    if default is not None and default not in prompts:
        raise reader.error("default_prompt_name", "one of `prompts`")
    return prompts, default


def _dimensions(
    config: Mapping[str, Any], hidden_size: int, reader: ConfigReader
) -> tuple[int, ...] | None:
    """To how many numbers an embedding may be cut, by the keys that vLLM reads."""
    listed = config.get("matryoshka_dimensions")
    if listed is None:
        return () if reader.flag("is_matryoshka") else None
    good = isinstance(listed, list) and 0 < len(listed) <= _MAX_DIMENSIONS
    if not good or not all(type(size) is int and 0 < size <= hidden_size for size in listed):
        raise reader.error("matryoshka_dimensions", f"a list of numbers from 1 to `{hidden_size}`")
    return tuple(sorted(set(listed)))


def _activation(config: Mapping[str, Any], num_labels: int) -> ScoreActivation:
    """What makes scores of raw ones: as sentence-transformers' CrossEncoder has saved it, if so."""
    section = config.get("sentence_transformers")
    named = section.get("activation_fn") if isinstance(section, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is not None:
        known: dict[str, ScoreActivation] = {"Identity": "identity", "Sigmoid": "sigmoid"}
        name = str(named).rpartition(".")[2]
        if name not in known:
            raise UnsupportedModel(
                f"The activation of scores is `{str(named)[:80]}` in the model's config; it must "
                "be Identity or Sigmoid."
            )
        return known[name]
    is_apart = num_labels == 1 or config.get("problem_type") == "multi_label_classification"
    return "sigmoid" if is_apart else "softmax"


def _labels(config: Mapping[str, Any], num_labels: int) -> tuple[str, ...]:
    """The names of a classifier's labels; one without a name has transformers' name for it."""
    names = config.get("id2label")
    names = names if isinstance(names, Mapping) else {}
    return tuple(str(names.get(str(i), f"LABEL_{i}"))[:256] for i in range(num_labels))


def pooled(kind: Kind, hidden: F32, query_start: NDArray[np.int32]) -> F32:
    """The vectors [R, hidden] of texts whose hidden states [T, hidden] lie one after the other.

    Text r has the rows [query_start[r], query_start[r + 1]), at least one. Sums are float64, text
    by text, so that a text's vector does not hang on its neighbours.
    """
    if kind == "cls":
        return hidden[query_start[:-1]]
    if kind == "last":
        return hidden[query_start[1:] - 1]
    parts = np.split(hidden, query_start[1:-1])
    if kind == "max":
        return np.stack([part.max(axis=0) for part in parts])
    power = 1.0 if kind == "mean" else 0.5
    sums = [part.sum(axis=0, dtype=np.float64) / len(part) ** power for part in parts]
    return np.stack(sums).astype(np.float32)


def rows_of(kind: Kind, query_start: NDArray[np.int32]) -> NDArray[np.int64] | None:
    """The tokens whose hidden states are wanted, one a text; None: all of them."""
    if kind == "cls":
        return query_start[:-1].astype(np.int64)
    if kind == "last":
        return query_start[1:].astype(np.int64) - 1
    return None


def normalised(vectors: F32) -> F32:
    """Vectors [..., size] with a length of 1 each; those of length 0 stay."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=-1, keepdims=True))
    unit: F32 = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit


def activated(activation: ScoreActivation, scores: F32) -> F32:
    """Scores [N, labels] as they are told."""
    if activation == "identity":
        return scores
    wide = scores.astype(np.float64)
    if activation == "sigmoid":  # both halves without an overflow
        small = np.exp(-np.abs(wide))
        return np.where(wide >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    shares: F32 = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)
    return shares

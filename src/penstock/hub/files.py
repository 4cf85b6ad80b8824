"""Which files of a repository make a model, and nothing else of it is fetched.

Owns the choice: configs, tokenizer and templates by name; safetensors by their index; of GGUF files
one variant with all its parts. Never a pickle and never Python. Knows names only, so that the same
choice is made from a hub's listing and from a directory of the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from penstock.errors import ModelLoadError

INDEX = "model.safetensors.index.json"
DEFAULT_VARIANT = "Q4_K_M"  # where several are offered and none is named, as llama.cpp and Ollama

_SMALL = {
    "config.json",
    "generation_config.json",
    "params.json",  # Mistral's own
    "quantize_config.json",  # GPTQ's, before it went into config.json
    "quant_config.json",  # AWQ's
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",  # of embedding models: what comes behind the transformer
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    INDEX,
    "consolidated.safetensors.index.json",
}
_LIKE_SMALL = (
    "tokenizer.model.v*",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
    "[0-9]_*/config.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LABEL = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|F32|FP16|FP32|MXFP4\w*))$", re.I
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_NO_MODEL = ("mmproj", "imatrix")  # GGUF files that only go with one

ReadJson = Callable[[str], dict[str, Any]]


def small_files(names: Iterable[str]) -> list[str]:
    """Those that say what the model is and how its text becomes tokens."""
    return sorted(name for name in names if name in _SMALL or _is_like_small(name))


def _is_like_small(name: str) -> bool:
    return any(
        name.count("/") == like.count("/") and fnmatchcase(name, like) for like in _LIKE_SMALL
    )


def weight_files(repo: str, names: Iterable[str], variant: str | None, read: ReadJson) -> list[str]:
    """The files with the weights, in order; of GGUF the first is the one to open.

    Args:
        repo: for sentences.
        names: of all files of the repository.
        variant: of GGUF files, such as `Q4_K_M`, or the name of one such file.
        read: gives the content of a small file of the repository.

    Raises:
        ModelLoadError: there are no weights that penstock would read, or several may be meant.
    """
    names = set(names)
    if variant is not None:
        return _gguf(repo, names, variant)
    if INDEX in names:
        return _by_index(repo, names, read(INDEX))
    tensors = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    consolidated = [name for name in tensors if name.startswith("consolidated")]
    adapters = [name for name in tensors if name.startswith("adapter_")]
    others = [name for name in tensors if name not in consolidated and name not in adapters]
    if "model.safetensors" in others:
        return ["model.safetensors"]
    if len(others) > 1:
        raise ModelLoadError(
            f"`{repo}` has `{len(others)}` safetensors files and no `{INDEX}`, which would say "
            "what belongs together."
        )
    if found := others or consolidated:
        return found
    if any(name.endswith(".gguf") for name in names):
        return _gguf(repo, names, None)
    raise _no_weights(repo, names, has_adapter=bool(adapters))


def _by_index(repo: str, names: set[str], index: dict[str, Any]) -> list[str]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(f"`{INDEX}` of `{repo}` has no `weight_map` of file names.")
    for shard in shards.values():
        is_right = isinstance(shard, str) and shard in names and shard.endswith(".safetensors")
        if not is_right:
            raise ModelLoadError(
                f"`{INDEX}` of `{repo}` names `{ascii(shard)[:100]}`, which is not a safetensors "
                "file there."
            )
    return sorted(set(shards.values()))


def variants(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among the files: the first part's stem, and all parts in order.

    A model of which a part is missing is left out.
    """
    parts: dict[str, dict[int, str]] = {}
    wanted: dict[str, int] = {}
    for name in sorted(names):
        base = name.rsplit("/", 1)[-1].lower()
        if not name.endswith(".gguf") or any(part in base for part in _NO_MODEL):
            continue
        stem = name.removesuffix(".gguf")
        split = _SPLIT.search(stem)
        stem = stem[: split.start()] if split else stem
        parts.setdefault(stem, {})[int(split[1]) if split else 1] = name
        wanted[stem] = int(split[2]) if split else 1
    return {
        stem: [found[number] for number in sorted(found)]
        for stem, found in parts.items()
        if sorted(found) == list(range(1, min(wanted[stem], len(found) + 1) + 1))
    }


def label(stem: str) -> str | None:
    """The quantization that the name of a GGUF file ends with, such as `Q4_K_M`."""
    found = _LABEL.search(stem.rsplit("/", 1)[-1])
    return found[1].upper() if found else None


def _gguf(repo: str, names: set[str], variant: str | None) -> list[str]:
    offered = variants(names)
    if not offered:
        raise ModelLoadError(f"`{repo}` has no GGUF file.")
    if variant is None and len(offered) == 1:
        return next(iter(offered.values()))
    wanted = (variant or DEFAULT_VARIANT).upper()
    found = [parts for stem, parts in offered.items() if label(stem) == wanted]
    found = found or [
        parts
        for stem, parts in offered.items()
        if wanted in (stem.upper(), f"{stem}.gguf".upper(), parts[0].upper())
    ]
    if len(found) == 1:
        return found[0]
    told = sorted({label(stem) or stem for stem in offered} if not found else offered)
    shown = ", ".join(f"`{repo}:{name}`" for name in told[:20])
    asked = f"GGUF models `{variant}`" if variant else "GGUF models, and none is named"
    raise ModelLoadError(
        f"`{repo}` has `{len(found) if variant else len(offered)}` {asked}.",
        hint=f"name one: {shown}" + (f" and {len(told) - 20} others" if len(told) > 20 else ""),
    )


def _no_weights(repo: str, names: set[str], *, has_adapter: bool) -> ModelLoadError:
    if has_adapter or "adapter_config.json" in names:
        return ModelLoadError(f"`{repo}` holds an adapter (LoRA), not a model.")
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return ModelLoadError(
            f"`{repo}` has its weights in `{pickles[0]}`, which can run code when it is read, and "
            "is never fetched.",
            hint="take a repository with safetensors or GGUF files; many have a converted copy",
        )
    return ModelLoadError(f"`{repo}` has neither safetensors nor GGUF files.")

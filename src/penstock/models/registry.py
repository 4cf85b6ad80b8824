"""From a config to the file that reads it.

Imports an architecture's file only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from penstock.errors import UnsupportedModel
from penstock.layers.specs import ExpertsSpec
from penstock.models.architectures import ARCHITECTURES, POOLING_ARCHITECTURES
from penstock.models.architectures.foreign import is_known
from penstock.models.config import ConfigReader
from penstock.models.spec import ModelSpec

MAX_ALL_EXPERTS = 2**16  # three times those of the largest model published

Read = Callable[[ConfigReader], ModelSpec]


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config as Hugging Face writes it.

    Raises:
        UnsupportedModel: the architecture is not known (the hint lists those that are), or a key is
            missing, has the wrong type or a value that is not implemented.
    """
    return read_from(ConfigReader(config))


def read_from(reader: ConfigReader) -> ModelSpec:
    """The same of a config that is being read already."""
    files = ARCHITECTURES | POOLING_ARCHITECTURES
    name = files.get(reader.architecture)
    if name is None and is_known(reader.architecture):
        name = "foreign"
    if name is None:
        raise UnsupportedModel(
            f"The architecture `{reader.architecture:.80}` is neither one of ours nor one that an "
            "installed transformers has.",
            hint=f"ours are {', '.join(f'`{name}`' for name in sorted(files))}.",
        )
    read: Read = importlib.import_module(f"penstock.models.architectures.{name}").read
    spec = read(reader)
    if not spec.is_encoder:  # code of a repository may see what comes later (gte-Qwen2)
        reader.expect("is_causal", True)
    num_experts = sum(
        layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, ExpertsSpec)
    )
    if num_experts > MAX_ALL_EXPERTS:  # each has a name and a place, before anything is loaded
        raise UnsupportedModel(
            f"The model's config asks for `{num_experts}` experts in `{spec.num_layers}` layers, "
            f"more than `{MAX_ALL_EXPERTS}`."
        )
    return spec

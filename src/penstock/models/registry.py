"""Which file builds which architecture.

Owns the table. Imports an architecture's file only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from penstock.errors import UnsupportedModel
from penstock.layers.toolkit import Toolkit
from penstock.models.blocks import Decoder
from penstock.models.spec import ModelSpec

Builder = Callable[[ModelSpec, Toolkit], Decoder]

# Name in `architectures` of config.json -> "module:function", the function being a `Builder`.
ARCHITECTURES = {
    "LlamaForCausalLM": "penstock.models.llama:build",
}


def builder(architecture: str) -> Builder:
    """The function that builds such a model.

    Raises:
        UnsupportedModel: the architecture is not known; the hint lists those that are.
    """
    path = ARCHITECTURES.get(architecture)
    if path is None:
        raise UnsupportedModel(
            f"The architecture `{architecture}` is not supported.",
            hint=f"supported are {', '.join(f'`{name}`' for name in sorted(ARCHITECTURES))}.",
        )
    module, _, function = path.partition(":")
    build: Builder = getattr(importlib.import_module(module), function)
    return build

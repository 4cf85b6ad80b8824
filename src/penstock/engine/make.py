"""From settings to the engine that they ask for: one that generates, or one that pools.

Owns that choice. What a checkpoint is for, it says itself: by its architecture, or by
sentence-transformers' files beside it.
"""

from __future__ import annotations

from penstock.engine.config import EngineConfig
from penstock.engine.locate import locate
from penstock.engine.loop import Core
from penstock.errors import ConfigError
from penstock.models.architectures import POOLING_ARCHITECTURES
from penstock.models.files import read_config
from penstock.models.pooling import has_modules


def make_core(config: EngineConfig) -> Core:
    """Load the model of `config`.

    Raises:
        ConfigError: a setting is wrong, there is no such model, or it cannot do what is asked.
        ModelLoadError: the checkpoint cannot be used.
        NotEnoughMemory: it would not fit. Nothing has been loaded then.
    """
    config = locate(config)
    if config.runner != "pooling":
        names = read_config(config.path).get("architectures")
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        is_headless = isinstance(name, str) and name in POOLING_ARCHITECTURES
        if config.runner == "generate" and is_headless:
            raise ConfigError(
                f"`runner` is `generate`, and a `{name}` writes no text.",
                hint="leave it out: the model is served for embeddings or scores",
            )
        if config.runner == "generate" or not (is_headless or has_modules(config.path)):
            from penstock.engine.core import EngineCore

            return EngineCore.from_config(config)
    from penstock.engine.pooling import PoolingCore

    return PoolingCore.from_config(config)

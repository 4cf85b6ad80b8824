"""Where the model of a config lies. Asked once, in the process that has the terminal, so that a
download shows its progress there and an engine's process only opens what is there."""

from __future__ import annotations

from dataclasses import replace

from penstock.engine.config import EngineConfig
from penstock.hub import resolve_model


def locate(config: EngineConfig) -> EngineConfig:
    """This config with `path`; a model of a hub is downloaded, if it is not here.

    Raises:
        ConfigError: there is no such model, or no room for it.
        ModelLoadError: the hub refuses it, or it is damaged on the way.
    """
    if config.model_path is not None:
        return config
    return replace(config, model_path=str(resolve_model(config.model, config.revision)))

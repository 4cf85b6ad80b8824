"""A tiny random model for the engine's tests: its checkpoint, the loaded model, and the oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `helpers_*`

from helpers_tiny import Oracle, TinyModel, load_tiny, random_weights, write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `EngineConfig(model=...)` can name."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), random_weights())


@pytest.fixture(scope="session")
def tiny(checkpoint: Path) -> TinyModel:
    """The checkpoint, loaded once; `tiny.core(...)` makes an engine with it in milliseconds."""
    return load_tiny(checkpoint)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(random_weights())

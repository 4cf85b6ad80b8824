"""A tiny random model for the engine's tests: its checkpoint, the loaded model, and the oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `helpers_*`

from helpers_tiny import Oracle, TinyModel, random_weights, write_checkpoint
from tests.models.helpers import BACKENDS


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `EngineConfig(model=...)` can name."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), random_weights())


@pytest.fixture(scope="session", params=BACKENDS)
def tiny(checkpoint: Path, request: pytest.FixtureRequest) -> TinyModel:
    """The checkpoint on a backend; `tiny.core(...)` makes an engine with it in milliseconds."""
    return TinyModel(checkpoint, backend=request.param)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(random_weights())

"""Fixtures of the tests of measuring: a server that does what a script says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `scripted_server`

from scripted_server import Scripted, scripted


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def _scripted_process() -> Iterator[Scripted]:
    with scripted() as server:
        yield server


@pytest.fixture
def scripted_server(_scripted_process: Scripted) -> Scripted:
    """The scripted server with its default script and an empty log."""
    _scripted_process.configure()
    return _scripted_process

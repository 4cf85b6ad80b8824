"""Fixtures of the tests of tracking."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tracked_world import Wall, World, config_of


@pytest.fixture
def world(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(database_url, Wall(monkeypatch), config_of())
    yield world
    world.book.close()

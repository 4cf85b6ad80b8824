"""The recipe of an engine that is a small script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from penstock.measure.engines import recipes

SCRIPT = Path(__file__).with_name("fake_engine.py")


@pytest.fixture(autouse=True)
def fake_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fake:anything` is an arm."""
    recipe = recipes.Recipe(
        name="fake",
        program=(sys.executable, str(SCRIPT)),
        arguments=("--model", "{model}", "--port", "{port}", "--name", "{name}"),
        install="write it",
    )
    monkeypatch.setitem(recipes.RECIPES, "fake", recipe)

"""What the documents name must exist: symbols of the tour, files of the tree, links, figures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def resolve(symbol: str) -> object:
    """The object that a dotted name means; the longest importable prefix is the module."""
    parts = symbol.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(symbol)


def symbols_of(path: Path) -> list[str]:
    return sorted(set(re.findall(r"`(penstock(?:\.\w+)+)`", path.read_text())))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_symbols_exist(path: Path) -> None:
    for symbol in symbols_of(path):
        resolve(symbol)


def test_the_tour_names_symbols() -> None:
    assert len(symbols_of(ROOT / "docs" / "design" / "tour.md")) > 20


def test_a_wrong_symbol_fails() -> None:
    with pytest.raises(AttributeError):
        resolve("penstock.types.Nothing")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_readme_tree_names_files() -> None:
    """Every path in the README's file tree exists."""
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree, "the README has a file tree"
    for line in tree[1].splitlines():
        if line.strip():
            name = line.split()[0]
            assert (ROOT / name).exists(), name


def test_readme_python_runs() -> None:
    """The README's Python answers, exactly as it stands there."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code[1]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_generated_parts_are_up_to_date() -> None:
    """Figures in the README are those of results/, options those of the code."""
    command = [sys.executable, str(ROOT / "tools" / "docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

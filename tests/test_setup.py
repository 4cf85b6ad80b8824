"""Building the native library: a failure leaves none, and is an error where one is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.native import library

ROOT = Path(__file__).parent.parent
# Needs no compiler: the "library" is an empty file.
WORKS = """cmake_minimum_required(VERSION 3.20)
project(stand_in NONE)
add_custom_target(penstock_native COMMAND ${CMAKE_COMMAND} -E touch libpenstock_native.so)
"""
OTHER_SUFFIX = WORKS.replace(".so", ".dylib")
BROKEN = 'cmake_minimum_required(VERSION 3.20)\nmessage(FATAL_ERROR "broken")\n'

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")


class Tree:
    """A package like ours, with an older library in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.library = root / "src/penstock/native/libpenstock_native.so"
        self.library.parent.mkdir(parents=True)
        for package in (self.library.parent, self.library.parent.parent):
            (package / "__init__.py").touch()
        self.library.write_text("older")
        (root / "csrc").mkdir()
        shutil.copy(ROOT / "setup.py", root)
        (root / "pyproject.toml").write_text(
            '[project]\nname = "penstock"\nversion = "0"\n'
            '[tool.setuptools.packages.find]\nwhere = ["src"]\n'
        )

    def build(self, cmake: str, **environment: str) -> int:
        """Build in place with such a CMakeLists.txt; the exit status."""
        (self.root / "csrc/CMakeLists.txt").write_text(cmake)
        environment = {"PENSTOCK_REQUIRE_NATIVE": "0", **environment}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=self.root, env=os.environ | environment).returncode


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize("cmake", [BROKEN, OTHER_SUFFIX])
def test_a_failure_leaves_no_older_library(tree: Tree, cmake: str) -> None:
    assert tree.build(cmake) == 0, "the package works without it"
    assert not tree.library.exists()


def test_nor_does_the_build_directory_bring_one(tree: Tree) -> None:
    assert tree.build(WORKS) == 0
    assert tree.library.read_text() == ""
    assert tree.build(BROKEN) == 0
    assert not tree.library.exists()


def test_where_it_is_required_a_failure_is_an_error(tree: Tree) -> None:
    assert tree.build(BROKEN, PENSTOCK_REQUIRE_NATIVE="1") != 0
    assert not tree.library.exists()
    assert tree.build(WORKS, PENSTOCK_REQUIRE_NATIVE="1") == 0
    assert tree.library.read_text() == ""


@pytest.mark.skipif(not (shutil.which("ninja") and shutil.which("make")), reason="one generator")
def test_a_build_goes_on_with_another_generator(tree: Tree, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cmake", "make"):
        (programs / name).symlink_to(str(shutil.which(name)))
    assert tree.build(WORKS, PENSTOCK_REQUIRE_NATIVE="1") == 0
    only_make = {"PENSTOCK_REQUIRE_NATIVE": "1", "PATH": f"{programs}"}
    assert tree.build(WORKS, **only_make) == 0
    assert tree.build(WORKS, PENSTOCK_REQUIRE_NATIVE="1") == 0


def test_the_library_is_there_where_it_is_required() -> None:
    """Other tests are skipped without it; this one is what tells."""
    if os.environ.get("PENSTOCK_REQUIRE_NATIVE", "0") in {"", "0"}:
        pytest.skip("PENSTOCK_REQUIRE_NATIVE is not set")
    assert library.unavailable_reason() is None

"""The GPU suite's runner: a file that crashes or hangs is told, and the others go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tools import gpu_suite

VARIABLES = os.environ | {"PYTHONPATH": str(gpu_suite.ROOT)}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the suite says."""
    said: list[str] = []
    monkeypatch.setattr(gpu_suite, "say", said.append)
    return said


def test_every_outcome_is_counted(
    tmp_path: Path, quiet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "FILE_LIMIT_S", 6.0)
    mixed = tmp_path / "test_mixed.py"
    mixed.write_text(
        "import os, pytest, warnings\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    raise ValueError\n"
        "def test_good(): warnings.warn('versions differ')\n"
        "def test_skipped(): pytest.skip('no')\n"
        "def test_wrong(): assert False\n"
        "def test_ends_badly(broken): pass\n"
        "def test_crashes(): os.abort()\n"
        "def test_never_runs(): pass\n"
    )
    unreadable = tmp_path / "test_unreadable.py"
    unreadable.write_text("import nothing_of_this_name\n")
    hangs = tmp_path / "test_hangs.py"
    hangs.write_text("import time\ndef test_good(): pass\ndef test_hangs(): time.sleep(60)\n")
    counts = gpu_suite.run_all([mixed, unreadable], [hangs], VARIABLES, 60.0, num_workers=2)
    assert counts.passed == 2
    assert counts.skipped == 1
    assert [name.rpartition("/")[2] for name in counts.failures] == [
        "test_hangs.py::test_hangs",
        "test_mixed.py::test_crashes",
        "test_mixed.py::test_ends_badly",
        "test_mixed.py::test_wrong",
        "test_unreadable.py",
    ]
    assert counts.failed == 5


def test_with_no_time_left_a_file_fails(tmp_path: Path, quiet: list[str]) -> None:
    late = tmp_path / "test_late.py"
    late.write_text("def test_good(): pass\n")
    counts = gpu_suite.run_all([late], [], VARIABLES, 1.0, num_workers=1)
    assert counts.failures == [f"{late} (no time was left)"]


def test_a_line_tells_when_where_and_what() -> None:
    names = ("device", "driver", "torch", "triton", "python")
    counts = gpu_suite.Counts(3, 1, 2, ["a::b"])
    line = gpu_suite.line_of({**dict.fromkeys(names, "x"), "cuda": "y"}, counts, 1.26)
    assert json.loads(json.dumps(line)) == line
    assert set(line) == {
        *("time", "commit", "dirty", *names, "passed", "failed", "skipped", "failures", "seconds")
    }
    assert (line["passed"], line["failures"], line["seconds"]) == (3, ["a::b"], 1.3)


def test_the_suite_finds_its_files() -> None:
    together, alone = gpu_suite.files(gpu_suite.TOGETHER), gpu_suite.files(gpu_suite.ALONE)
    assert {path.name for path in alone} >= {"test_memory.py", "test_steady.py", "test_tokens.py"}
    assert len(set(together)) == len(together) > 0
    assert not set(together) & set(alone)


def test_without_git_the_commit_is_told_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import common

    monkeypatch.setenv("PENSTOCK_COMMIT", "abc1234")
    assert common.commit() == "abc1234"
    monkeypatch.delenv("PENSTOCK_COMMIT")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert common.commit() == "unknown"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, quiet: list[str]) -> None:
    monkeypatch.setattr(gpu_suite.machine, "ask", lambda *told: "There is no GPU.")
    monkeypatch.setattr("sys.argv", ["gpu_suite"])
    assert gpu_suite.main() == 69
    assert quiet[0].startswith("There is no GPU.")

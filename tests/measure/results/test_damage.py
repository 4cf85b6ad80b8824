"""Any byte of any file of a run may be another one: a sentence, never a traceback."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.cli import results, verify
from penstock.errors import PenstockError
from penstock.measure.records import Arm
from penstock.measure.results import store
from penstock.measure.results.headline import headline
from penstock.measure.run import FIGURES, HEADER, PAGE, RECORDS

MakeRun = Callable[..., Path]
FILES = (HEADER, RECORDS, FIGURES, PAGE)


def ask(command: click.Command, *arguments: str) -> int:
    """A command's status, as `penstock.cli.main` makes it; any other error is raised."""
    done = CliRunner().invoke(command, list(arguments), standalone_mode=False)
    if isinstance(done.exception, PenstockError):
        return 1
    if done.exception is not None:
        raise done.exception
    return done.return_value or 0


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255)
)
def test_any_byte_of_any_file(make_run: MakeRun, name: str, share: float, byte: int) -> None:
    root = store.runs_dir()
    if not root.exists():
        make_run("whole")
        make_run("broken", arms=[Arm(name="a", target="http://h", model="m")])
    path = root / "broken" / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[math.floor(share * len(whole))] = byte
    path.write_bytes(changed)
    try:
        status = ask(verify.command, "broken")
        if bytes(changed) != whole and name != FIGURES:  # white space of figures may differ
            assert status in (1, 4)
        for arguments in (
            ("show", "broken"),
            ("show", "broken", "--all"),
            ("diff", "whole", "broken"),
            ("diff", "broken", "whole", "--all"),
            ("export", "broken"),
        ):
            assert ask(results.command, *arguments) in (0, 1, 3)
        assert ask(results.command) == 0
        assert {Path(entry.path).name for entry in store.entries()} == {"whole", "broken"}
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [HEADER, RECORDS, FIGURES])
def test_what_is_no_text_is_damaged(make_run: MakeRun, name: str) -> None:
    make_run("whole")
    path = make_run("broken") / name
    data = path.read_bytes()
    place = data.index(b'"a"') + 1
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    done = CliRunner().invoke(verify.command, ["broken"])
    assert isinstance(done.exception, PenstockError)
    assert "is damaged" in str(done.exception)
    assert name in str(done.exception)
    listed = CliRunner().invoke(results.command, []).stdout
    assert "whole" in listed
    states = {Path(entry.path).name: entry.state for entry in store.entries()}
    assert states["whole"] == "valid"
    if name != RECORDS:  # which a list does not decode
        assert states["broken"] == "damaged"


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_a_file(make_run: MakeRun, name: str) -> None:
    path = make_run("broken") / name
    path.unlink()
    path.mkdir()
    assert ask(verify.command, "broken") == 1
    assert ask(results.command) == 0


@pytest.mark.parametrize("kind", ["bench", "engines", "eval", "compare", "track", "import"])
def test_figures_of_another_shape(kind: str) -> None:
    for figures in ({}, {"stages": [{}]}, {"arms": 3, "rows": [1], "groups": [[]], "series": 1}):
        with pytest.raises(PenstockError, match="are not as the kind"):
            headline(kind, figures)


def test_a_run_that_is_not_valid_is_told(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.measure.results import imported

    made = imported.figures
    monkeypatch.setattr(imported, "figures", lambda *told: (made(*told)[0], ["2 of 3 blocks"]))
    make_run("cut", finish=False)
    done = CliRunner().invoke(verify.command, ["cut", "--finish"], standalone_mode=False)
    assert done.return_value == 3
    assert "NOT VALID: 2 of 3 blocks" in done.stdout
    assert ask(results.command, "show", "cut") == 3
    assert [entry.state for entry in store.entries()] == ["not valid"]


def test_records_that_give_no_figures(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.measure.results import imported

    def figures(*_: object) -> None:
        raise KeyError("stage")

    monkeypatch.setattr(imported, "figures", figures)
    make_run("cut", finish=False)
    done = CliRunner().invoke(verify.command, ["cut", "--finish"])
    assert isinstance(done.exception, PenstockError)
    assert "No figures follow from the records" in str(done.exception)

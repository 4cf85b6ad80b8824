"""How commands that measure end: what is printed where, and which exit status it is."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path

import click
import pytest

from penstock.cli import runs
from penstock.errors import ConfigError
from penstock.measure.run import Figures, Writer, new_header


class Measured:
    """A session that writes a run and does something then."""

    def __init__(self, path: Path, error: BaseException | None = None) -> None:
        self.path: Path | None = None
        self._directory, self._error = path, error

    async def run(self) -> None:
        with Writer(new_header("bench", settings={}, arms=[]), self._directory) as writer:
            self.path = writer.path
            if self._error is not None:
                raise self._error


def made(*problems: str) -> Figures:
    return Figures(
        kind="bench",
        header_sha256="",
        records_sha256="",
        num_records=0,
        problems=list(problems),
        figures={"a": 1},
    )


@pytest.mark.parametrize(
    ("problems", "bad", "status"),
    [((), False, 0), (("late",), False, 3), ((), True, 4), (("late",), True, 3)],
)
def test_the_status_says_what_became_of_the_run(
    problems: tuple[str, ...], bad: bool, status: int
) -> None:
    assert runs.tell(Path("r"), made(*problems), lambda: "", as_json=False, bad=bad) == status


def test_figures_go_to_stdout_and_the_page_is_the_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs.tell(Path("r"), made("late"), lambda: "1 token", as_json=False)
    told = capsys.readouterr()
    assert told.out == "1 token\n\nThis run is not valid:\n- late\n"
    assert told.err == "report: r/report.html\n"
    runs.tell(Path("r"), made("late"), lambda: "1 token", as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out) == {"run": "r", "problems": ["late"], "figures": {"a": 1}}


def test_what_was_interrupted_is_printed_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs.tell(Path("r"), made(), lambda: "1 token", as_json=False, interrupted=True)
    assert capsys.readouterr().out == "1 token\n"


def test_what_is_refused_is_wrong_usage() -> None:
    with pytest.raises(click.UsageError) as caught, runs.usage():
        raise ConfigError("It is wrong.", hint="mend it")
    assert caught.value.message == "It is wrong.\nhint: mend it"
    assert caught.value.exit_code == 2


def test_a_run_that_was_cancelled_has_figures(tmp_path: Path) -> None:
    session = Measured(tmp_path / "run", asyncio.CancelledError())
    found, interrupted = runs.measured(session, session.run())
    assert interrupted
    assert found.problems == ["No load was begun."]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    session = Measured(tmp_path / "run", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ConfigError, match="cannot be written on: No space left on device"):
        runs.measured(session, session.run())

"""How every command that makes a run ends: what it prints where, and its exit status.

Results go to stdout, everything else to stderr, the run's page last. Knows no figure.
"""

from __future__ import annotations

import asyncio
import errno
import json
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import click

from penstock.errors import ConfigError
from penstock.measure.run import HEADER, PAGE, Figures

OK, ERROR, USAGE, NOT_VALID, BAD = range(5)  # exit statuses; Ctrl-C and SIGTERM are 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Session(Protocol):
    """A command that measures. `path` is None until there is a run."""

    path: Path | None


@contextmanager
def usage() -> Iterator[None]:
    """What is refused within, before anything is measured, is wrong usage: exit status 2."""
    try:
        yield
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def check_output(output: Path | None) -> None:
    """Refuse a directory that holds a run, before anything is started.

    Raises:
        click.UsageError: it does.
    """
    if output is not None and (output / HEADER).exists():
        raise click.UsageError(f"`{output}` holds a run already.\nhint: name another directory")


def measured(
    session: Session,
    work: Coroutine[Any, Any, None],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> tuple[Figures, bool]:
    """Run a session to its end or its interruption, and make figures of what was recorded.

    Returns:
        The figures, and whether it was interrupted.

    Raises:
        KeyboardInterrupt: it was, before there was a run.
        ConfigError: the disk is full.
    """
    from penstock.measure.kinds import finish

    interrupted = False
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C, SIGTERM
        interrupted = True
    except OSError as error:
        if session.path is None or error.errno not in _FULL:
            raise
        raise ConfigError(
            f"The run `{session.path}` cannot be written on: {error.strerror}.",
            hint=f"make room; `penstock verify --finish {session.path}` makes figures of the rest",
        ) from None
    if session.path is None:
        raise KeyboardInterrupt
    return finish(session.path), interrupted


def tell(
    path: Path,
    made: Figures,
    text: Callable[[], str],
    *,
    as_json: bool,
    bad: bool = False,
    interrupted: bool = False,
) -> int:
    """Print the figures of a finished run; the exit status.

    Args:
        text: the figures for a terminal.
        bad: the answer is a bad one, such as a limit that is broken.

    Raises:
        KeyboardInterrupt: the run was interrupted; what it came to is printed.
    """
    if as_json:
        told = {"run": str(path), "problems": made.problems, "figures": made.figures}
        click.echo(json.dumps(told))
    else:
        click.echo(text())
        if made.problems:
            lines = ["", "This run is not valid:", *(f"- {problem}" for problem in made.problems)]
            click.echo("\n".join(lines))
        sys.stdout.flush()
        click.echo(f"report: {path / PAGE}", err=True)
    if interrupted:
        raise KeyboardInterrupt
    return NOT_VALID if made.problems else BAD if bad else OK

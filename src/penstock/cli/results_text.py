"""A run's figures in the terminal, as the command that made it prints them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.results.headline import MISSHAPEN, headline


def text(kind: str, figures: Mapping[str, Any]) -> str:
    """The kind's own text, without the problems of the run.

    Raises:
        ConfigError: the figures are not as the kind has them.
    """
    try:
        return "\n".join(_lines(kind, figures))
    except MISSHAPEN as error:
        raise ConfigError(
            f"The figures are not as the kind `{kind}` has them ({type(error).__name__}: {error}).",
            hint="changed, or of another version (`penstock verify`); `--all` prints them",
        ) from None


def _lines(kind: str, figures: Mapping[str, Any]) -> Iterator[str]:
    if kind == "bench":
        from penstock.cli import bench_print

        yield bench_print.text(figures)
    elif kind == "engines":
        from penstock.measure.engines import page as engines

        yield engines.text_table(figures)
    elif kind == "eval":
        from penstock.measure.quality import page as quality

        yield quality.text_table(figures)
    elif kind == "track":
        from penstock.cli.track import leaderboard

        yield from leaderboard(figures)
    elif kind == "compare":
        from penstock.measure.verdict import words

        yield words.text(figures)
    else:
        told = headline(kind, figures)
        width = max((len(one.title) for one in told), default=0)
        yield from (f"{one.title:<{width}}  {one.text}" for one in told)

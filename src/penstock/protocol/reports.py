"""An exception of ours as a message between two processes of ours.

Owns the way there and back; knows neither who sends it nor how. Invariant: what is told of an
unforeseen exception quotes nothing that a user has written.
"""

from __future__ import annotations

import traceback
from pathlib import PurePath
from typing import Any

import msgspec

from penstock import errors
from penstock.errors import EngineError, PenstockError


class ErrorReport(msgspec.Struct, frozen=True):
    """An exception as a value; `error` makes it an exception again, a new one for each reader."""

    kind: str
    message: str
    hint: str | None = None
    field: str | None = None
    retry_after_s: int | None = None

    @classmethod
    def of(cls, error: PenstockError) -> ErrorReport:
        """To raise the same error elsewhere."""
        return cls(
            type(error).__name__,
            error.message,
            error.hint,
            getattr(error, "field", None),
            getattr(error, "retry_after_s", None),
        )

    @classmethod
    def of_death(cls, error: Exception, who: str = "The engine") -> ErrorReport:
        """EngineDead that names what stopped the engine, and where.

        Without the exception's own words: clients read this, and they may quote a prompt. Only an
        EngineError tells its own: they are all written here.
        """
        if isinstance(error, EngineError):
            return cls.of(error)
        kind = type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        path = "".join(
            f" in `{frame.name}` ({PurePath(frame.filename).name}:{frame.lineno})"
            for frame in reversed(frames)
        )
        return cls("EngineDead", f"{who} stopped with `{kind}`{path}; its log says more.")

    @property
    def error(self) -> PenstockError:
        """The exception."""
        kind: type[PenstockError] = getattr(errors, self.kind)
        given: dict[str, Any] = {"hint": self.hint}
        if self.field is not None:
            given["field"] = self.field
        if self.retry_after_s is not None:
            given["retry_after_s"] = self.retry_after_s
        return kind(self.message, **given)


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A process is about to end: the error of loading, or what stopped it."""

    report: ErrorReport

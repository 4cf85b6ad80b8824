"""Structured logs: one JSON object a line on stderr, without the text of any prompt.

Only names, numbers and our own sentences are logged. Of an unexpected exception the type and the
frames are kept; its message is not, because it may quote a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import IO

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what `extra` brought becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = frames_of(record.exc_info[1])
        return json.dumps(fields, ensure_ascii=True, default=str)


def frames_of(error: BaseException) -> str:
    """The type of an exception and where it came from, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    path = " < ".join(f"{frame.name} {frame.filename}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__module__}.{type(error).__qualname__}: {path}"


def configure_logging(level: str, stream: IO[str] | None = None) -> None:
    """Send the logs of penstock and uvicorn to `stream` (stderr), and nothing else of theirs."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("penstock", "uvicorn"):
        target = logging.getLogger(name)
        target.handlers = [handler]
        target.propagate = False
        target.setLevel(level.upper())
    # uvicorn tells of every start and stop at "info"; our own lines say it already.
    logging.getLogger("uvicorn.error").setLevel(
        max(logging.WARNING, logging.getLogger("uvicorn").level)
    )

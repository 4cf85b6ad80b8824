"""A run's directory: written record by record, so that what is killed keeps what was finished.

`run.json` is the header, `records.jsonl` the raw records, `figures.json` what was made of them with
the hash of the records, `report.html` the page. Knows files, not what a figure means.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from penstock import __version__
from penstock.errors import ConfigError
from penstock.measure import environment
from penstock.measure.records import Arm, Clock, Header, Mark, Record, Request, Sample

HEADER, RECORDS, FIGURES, PAGE = "run.json", "records.jsonl", "figures.json", "report.html"
# What a damaged file gives a decoder. A text that is no UTF-8 is no error of msgspec.
DAMAGE = (msgspec.MsgspecError, UnicodeError, RecursionError)
_decode = msgspec.json.Decoder(Record).decode
_encoder = msgspec.json.Encoder()


class Figures(msgspec.Struct, kw_only=True):
    """`figures.json`: what was computed, from which records, and what is wrong with the run."""

    kind: str
    header_sha256: str = ""  # of the file; a header that was changed afterwards is found
    records_sha256: str
    num_records: int
    problems: list[str]  # why the run is not valid; empty: it is
    figures: dict[str, Any]


def runs_dir() -> Path:
    """Where runs are kept: PENSTOCK_RUNS, else `penstock-runs` in the current directory."""
    return Path(os.environ.get("PENSTOCK_RUNS") or "penstock-runs")


def new_header(kind: str, *, settings: dict[str, Any], arms: Sequence[Arm], **more: Any) -> Header:
    """A header with a fresh id; `more` are other fields of `Header`."""
    now = time.gmtime()
    return Header(
        run_id=f"{time.strftime('%Y%m%dT%H%M%S', now)}-{kind}-{secrets.token_hex(3)}",
        kind=kind,
        started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        version=__version__,
        command=["penstock", *environment.redact(sys.argv[1:])],
        settings=settings,
        arms=list(arms),
        **{"environment": environment.capture()} | more,
    )


class Writer:
    """A run that is under way. Each record is in the hands of the system when `add` returns."""

    def __init__(self, header: Header, directory: Path | None = None) -> None:
        """Make the directory, `runs_dir() / run_id` unless it is given, and write the header.

        Raises:
            ConfigError: the directory holds a run already, or cannot be written.
        """
        self.header = header
        self.clock = Clock()
        self.path = directory or runs_dir() / header.run_id
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / HEADER).open("xb") as file:
                file.write(msgspec.json.format(_encoder.encode(header)) + b"\n")
            self._file = (self.path / RECORDS).open("ab", buffering=0)
        except OSError as error:
            if isinstance(error, FileExistsError) and (self.path / HEADER).exists():
                raise ConfigError(
                    f"`{self.path}` holds a run already.", hint="name another directory"
                ) from None
            raise ConfigError(f"`{self.path}` cannot be written: {error.strerror}.") from None
        self._lock = threading.Lock()  # meters write from a thread of their own

    def add(self, record: Record) -> None:
        """Keep a record, whole or not at all.

        Values that are no numbers are left out: JSON has none, and no line would be read again.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        if isinstance(record, Request) and not _are_finite(record.scores):
            record = msgspec.structs.replace(record, scores=_finite(record.scores))
        elif isinstance(record, Sample) and not _are_finite(record.values):
            record = msgspec.structs.replace(record, values=_finite(record.values))
        line = _encoder.encode(record) + b"\n"
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            try:
                written = self._file.write(line)
                while written < len(line):  # a disk that is nearly full takes a part
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(size)  # the next line begins a line
                raise

    def mark(self, name: str, *, arm: str = "", stage: str = "", **facts: Any) -> None:
        """Keep what happens now."""
        self.add(Mark(t_ns=self.clock.now_ns(), name=name, arm=arm, stage=stage, facts=facts))

    def close(self) -> None:
        """Bring what was written to the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _are_finite(values: dict[str, float]) -> bool:
    return all(map(math.isfinite, values.values()))


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


class Run:
    """A run that was written, whole or not."""

    def __init__(self, path: Path) -> None:
        """Open a run's directory.

        Raises:
            ConfigError: it is none, or a line in it is damaged. A last line without its end is what
                a killed process leaves, and is not read.
        """
        self.path = path
        try:
            self.header = msgspec.json.decode((path / HEADER).read_bytes(), type=Header)
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"`{path}` has no `{HEADER}`: it is no run.", hint="`penstock results` lists runs"
            ) from None
        except OSError as error:
            raise ConfigError(f"`{path / HEADER}` cannot be read: {error.strerror}.") from None
        except DAMAGE as error:
            raise ConfigError(f"`{path / HEADER}` is damaged: {error}.") from None
        self.records = list(self._read())

    def _read(self) -> Iterator[Record]:
        try:
            data = (self.path / RECORDS).read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(
                f"`{self.path / RECORDS}` cannot be read: {error.strerror}."
            ) from None
        lines = data.split(b"\n")
        lines.pop()  # empty, or cut off
        for number, line in enumerate(lines, start=1):
            try:
                yield _decode(line)
            except DAMAGE as error:
                raise ConfigError(
                    f"Line `{number}` of `{self.path / RECORDS}` is damaged: {error}."
                ) from None

    @property
    def requests(self) -> list[Request]:
        return [record for record in self.records if isinstance(record, Request)]

    @property
    def header_sha256(self) -> str:
        """Hash of the header's file, as it is."""
        return hashlib.sha256((self.path / HEADER).read_bytes()).hexdigest()

    @property
    def records_sha256(self) -> str:
        """Hash of the file of records, as it is."""
        try:
            return hashlib.sha256((self.path / RECORDS).read_bytes()).hexdigest()
        except FileNotFoundError:
            return hashlib.sha256(b"").hexdigest()

    def figures(self) -> Figures | None:
        """What was computed when the run ended; None if it did not come to that.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            # All of it is read: what no field is made of may be damaged, too.
            found = msgspec.json.decode((self.path / FIGURES).read_bytes())
            return msgspec.convert(found, Figures)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"`{self.path / FIGURES}` cannot be read: {error.strerror}."
            ) from None
        except DAMAGE as error:
            raise ConfigError(f"`{self.path / FIGURES}` is damaged: {error}.") from None

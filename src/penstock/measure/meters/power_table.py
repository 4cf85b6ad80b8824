"""Tables of rated power (TDP) by the name of a processor or GPU, and how a name is found in them.

Reads codecarbon's `cpu_power.csv` and mlco2's `gpus.csv` from a directory that the user names. A
name matches if it is equal after what is no part of a model's name is left out; there is no nearest
match, because neighbours differ by a factor of three (`Xeon E5-2699 v4`: 145 W, `2699P`: 300 W).
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from functools import lru_cache
from pathlib import Path

import msgspec

from penstock.errors import ConfigError

CPU_FILE, GPU_FILE = "cpu_power.csv", "gpus.csv"
# What system and vendor add to a model's name.
_CPU_NOISE = re.compile(
    r"\((r|tm|c)\)|@.*$|\bw(ith|/) radeon.*$|\b\d+(th|nd|rd|st) gen\b|\b\w+-cores?\b"
    r"|\b(cpu|processor|apu)\b|\s"
)
_GPU_NOISE = re.compile(r"\b(nvidia|geforce|tesla|quadro)\b|[\s_-]")


class Match(msgspec.Struct, kw_only=True):
    """What a table says of a name. `watts` is None where it says nothing: see `explanation`."""

    name: str  # what was looked up
    entry: str | None = None  # the table's own name
    watts: float | None = None
    source: str = ""  # file and beginning of its SHA-256
    explanation: str


def directory(tables: Path | None) -> Path | None:
    """The folder of the tables within (or equal to) `tables`; None: it is not there."""
    for candidate in () if tables is None else (tables / "table-power-carbon", tables):
        if (candidate / CPU_FILE).is_file():
            return candidate
    return None


def cpu(name: str, folder: Path | None) -> Match:
    """Rated power of one CPU package, in watts."""
    if folder is None:
        return Match(name=name, explanation=f"no table `{CPU_FILE}` (--tables)")
    key = _CPU_NOISE.sub("", name.lower())
    if not re.search(r"\d", key):
        return Match(
            name=name,
            explanation=f"`{name}` names no model of processor, as virtual machines often do",
        )
    return _find(name, key, folder / CPU_FILE, _CPU_NOISE, "Name", "TDP")


def gpu(name: str, folder: Path | None) -> Match:
    """Rated power of one GPU, in watts."""
    if folder is None:
        return Match(name=name, explanation=f"no table `{GPU_FILE}` (--tables)")
    key = _GPU_NOISE.sub("", name.lower())
    return _find(name, key, folder / GPU_FILE, _GPU_NOISE, "name", "tdp_watts")


def file_source(file: Path) -> str:
    """A table's name with the beginning of its hash, so that a figure says which one it used."""
    return f"{file.name} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]})"


def read(file: Path) -> str:
    """The text of a table.

    Raises:
        ConfigError: it is not there, or is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`{file}` cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"`{file}` is not UTF-8.") from None


def _find(
    name: str, key: str, file: Path, noise: re.Pattern[str], name_field: str, watts_field: str
) -> Match:
    entries = _table(file, noise, name_field, watts_field).get(key, [])
    source = file_source(file)
    if not entries:
        return Match(name=name, source=source, explanation=f"`{file.name}` has no `{name}`")
    known: set[float] = set()
    for entry, told in entries:
        try:
            known.add(float(told))
        except ValueError:
            why = f"`{file.name}` says `{told}` of `{entry}`, which is no power"
            return Match(name=name, source=source, explanation=why)
    if len(known) > 1:
        options = ", ".join(f"`{entry}` {told} W" for entry, told in entries)
        return Match(name=name, source=source, explanation=f"`{name}` may be {options}")
    entry, watts = entries[0][0], known.pop()
    return Match(
        name=name,
        entry=entry,
        watts=watts,
        source=source,
        explanation=f"`{name}` is `{entry}` with {watts:g} W",
    )


@lru_cache(maxsize=8)
def _table(
    file: Path, noise: re.Pattern[str], name_field: str, watts_field: str
) -> dict[str, list[tuple[str, str]]]:
    """Entries (name, watts) by normalised name, as they are written: one has two decimal points."""
    table: dict[str, list[tuple[str, str]]] = {}
    reader = csv.DictReader(io.StringIO(read(file), newline=""))
    if not {name_field, watts_field} <= set(reader.fieldnames or ()):
        raise ConfigError(f"`{file}` has no columns `{name_field}` and `{watts_field}`.")
    for row in reader:
        entry = row[name_field]
        table.setdefault(noise.sub("", entry.lower()), []).append((entry, row[watts_field]))
    return table

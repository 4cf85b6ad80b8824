"""Files of other tools become a run of the kind `import`: their rows as records, once and for all.

The run holds the hash of each file, what the tool itself computed (by its own names, under
`source`), and what its names are called here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.environment import hash_file
from penstock.measure.records import Arm
from penstock.measure.results.readers import READERS
from penstock.measure.results.readers.common import Imported, check
from penstock.measure.run import Writer, new_header

# What to take of a directory: the files of each tool that are read. AIPerf writes the same requests
# once more, raw and in slices of time.
_PATTERNS = (
    *("results_*.json", "samples_*.jsonl", "benchmarks.json"),
    *("profile_export.jsonl", "profile_export_aiperf.json"),
)


def import_files(
    paths: Sequence[Path], *, form: str | None = None, directory: Path | None = None
) -> Path:
    """Write a run with what is in files of one tool, and compute its figures.

    Args:
        paths: files of one tool that belong together, or directories with such files.
        form: a name of `READERS`; None: as the files look.
        directory: where to write it, else below `runs_dir()`.

    Returns:
        The run's directory.

    Raises:
        ConfigError: a file cannot be read, is there twice, is of no known tool, or holds what
            cannot be; or the tools are several.
    """
    files = _files(paths)
    hashes = _hashes(files)
    read = [_read(path, form) for path in files]
    names = {name for name, _ in read}
    if len(names) > 1:
        raise ConfigError(
            f"The files are of several tools: {', '.join(sorted(names))}.", hint="import each apart"
        )
    reader = READERS[names.pop()]
    parts = [part for _, part in read]
    arms = _arms(parts, files)
    header = new_header(
        "import",
        settings={
            "format": reader.NAME,
            "names": reader.NAMES,
            "source": _by_file(parts, files, "source"),
            "source_settings": _by_file(parts, files, "settings"),
            "source_date": next((part.date for part in parts if part.date), ""),
            "has_timeline": all(part.has_timeline for part in parts if part.requests),
            "notes": list(dict.fromkeys(note for part in parts for note in part.notes)),
        },
        arms=list({arm.name: arm for arm in arms}.values()),
        hashes={str(path): sha256 for path, sha256 in zip(files, hashes, strict=True)},
        environment={},  # this machine is not the one that was measured
    )
    with Writer(header, directory) as writer:
        for part, arm in zip(parts, arms, strict=True):
            for row in part.requests:
                row.arm, row.model, row.engine = arm.name, arm.model, arm.engine
                writer.add(row)
    kinds.finish(writer.path)
    return writer.path


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted({file for pattern in _PATTERNS for file in path.glob(pattern)})
            if not inside:
                raise ConfigError(
                    f"`{path}` has no file of a known tool.", hint="name the files themselves"
                )
            found += inside
        else:
            found.append(path)
    return found


def _hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each; what is there twice would count twice."""
    hashes: list[str] = []
    for path in files:
        sha256 = hash_file(path)
        if sha256 in hashes:
            first = files[hashes.index(sha256)]
            raise ConfigError(
                f"`{first}` and `{path}` are the same file.", hint="its requests would count twice"
            )
        hashes.append(sha256)
    return hashes


def _read(path: Path, form: str | None) -> tuple[str, Imported]:
    document = _document(path)
    if form is not None:
        names = [form]
    else:
        names = [name for name, one in READERS.items() if one.recognises(document, path.name)]
    if not names:
        raise ConfigError(
            f"`{path}` is of no tool that is known.", hint=f"known: {', '.join(READERS)}"
        )
    reader = READERS[names[0]]
    if not reader.recognises(document, path.name):
        raise ConfigError(f"`{path}` does not look like a file of `{form}`.")
    try:
        made = reader.read(document, path.name)
        check(made.requests)
        return names[0], made
    except ValueError as error:
        raise ConfigError(f"`{path}` is not as `{names[0]}` writes it: {error}.") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"`{path}` is not as `{names[0]}` writes it ({type(error).__name__}: {error})."
        ) from None


def _document(path: Path) -> Any:
    """A JSON document, or the list of the documents of its lines."""
    try:
        data = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{path}` cannot be read as UTF-8 text: {error}.") from None
    if path.suffix != ".jsonl":
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            pass  # results that were appended to one another
    made = []
    for number, line in enumerate(data.split("\n"), start=1):
        if line.strip():
            try:
                made.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)
                raise ConfigError(f"Line `{number}` of `{path}` is no JSON: {why}.") from None
    return made


def _arms(parts: Sequence[Imported], files: Sequence[Path]) -> list[Arm]:
    """One arm for each file with rows; a file of figures says what those beside it measured."""
    named = next((part.arm for part in parts if part.arm.model), None)
    with_rows = [part for part in parts if part.requests]
    if named is not None and not any(part.arm.model for part in with_rows):
        return [named] * len(parts)
    names = [part.arm.name for part in parts]
    made = []
    for part, path in zip(parts, files, strict=True):
        # Two files about one model are two measurements.
        if names.count(part.arm.name) > 1 and len({path.stem for path in files}) == len(files):
            part.arm.name = f"{part.arm.name} ({path.stem})"
        made.append(part.arm)
    return made


def _by_file(parts: Sequence[Imported], files: Sequence[Path], name: str) -> dict[str, Any]:
    """What the tool says of itself; of several files by the file's name."""
    told = {path.name: getattr(part, name) for part, path in zip(parts, files, strict=True)}
    told = {file: value for file, value in told.items() if value}
    return next(iter(told.values()), {}) if len(files) == 1 else told

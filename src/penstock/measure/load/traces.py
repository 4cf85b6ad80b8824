"""Recorded arrivals: Azure's CSV of 2023, Mooncake's JSONL, and penstock's own request log.

Owns the forms of these files. Most hold lengths and no text: prompts of those lengths are made by
`penstock.measure.load.words`. Offsets are kept as they are, from the first arrival of the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError

BLOCK_TOKENS = 512  # that one of Mooncake's hash ids stands for
_AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?")


class Arrival(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One recorded request. Where there is no text, `num_in` says how long its prompt was."""

    due_s: float  # since the first arrival
    num_in: int | None = None
    num_out: int | None = None
    session: str | None = None  # who asked, where the trace says it
    prefix_blocks: tuple[int, ...] = ()  # equal ids: equal blocks of 512 tokens
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A file of arrivals in the order of their times."""

    kind: str
    arrivals: list[Arrival]
    num_skipped: int  # lines that are no request that can be sent again
    sha256: str


def read(path: Path, kind: str = "auto") -> list[Arrival]:
    """The arrivals of a file; see `read_trace`."""
    return read_trace(path, kind).arrivals


def read_trace(path: Path, kind: str = "auto") -> Trace:
    """Read a trace.

    Args:
        kind: `azure`, `mooncake`, `penstock`, or `auto`: what the first line looks like.

    Raises:
        ConfigError: the file cannot be read, or a line of it; file, line and field are named.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"The trace `{path}` cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The trace `{path}` cannot be read: it is no UTF-8.") from None
    kind = _guess(lines, path) if kind == "auto" else kind
    if kind not in _READERS:
        raise ConfigError(f"`{kind}` is no kind of trace.", hint=f"known: {', '.join(_READERS)}")
    found = []
    num_skipped = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (kind == "azure" and number == 1):
            continue
        try:
            arrival = _READERS[kind](line)
        except _BadField as error:
            raise ConfigError(f"`{path}`, line `{number}`: {error}.") from None
        if arrival is None:
            num_skipped += 1
        else:
            found.append(arrival)
    if not found:
        raise ConfigError(f"The trace `{path}` holds no request.")
    return Trace(
        kind=kind,
        arrivals=_from_first(found),
        num_skipped=num_skipped,
        sha256=hashlib.sha256(data).hexdigest(),
    )


class _BadField(Exception):
    """What is wrong with a field of a line: the end of a sentence."""


def _guess(lines: list[str], path: Path) -> str:
    first = next((line for line in lines if line.strip()), "")
    if first.replace(" ", "").startswith(_AZURE_HEADER):
        return "azure"
    if '"input_length"' in first:
        return "mooncake"
    if first.lstrip().startswith("{") and '"time"' in first:
        return "penstock"
    raise ConfigError(
        f"`{path}` is no trace that is known.",
        hint=f"Azure's CSV begins with `{_AZURE_HEADER}`; Mooncake's JSONL has `timestamp`, "
        "`input_length`, `output_length`, `hash_ids`; penstock's log has `time`",
    )


def _from_first(arrivals: Iterable[Arrival]) -> list[Arrival]:
    ordered = sorted(arrivals, key=lambda arrival: arrival.due_s)
    zero_s = ordered[0].due_s
    return [msgspec.structs.replace(each, due_s=each.due_s - zero_s) for each in ordered]


def _azure(line: str) -> Arrival:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 3:
        raise _BadField(f"it has `{len(cells)}` columns and not 3")
    return Arrival(
        due_s=_seconds("TIMESTAMP", cells[0]),
        num_in=_count("ContextTokens", cells[1]),
        num_out=_count("GeneratedTokens", cells[2]),
    )


def _mooncake(line: str) -> Arrival:
    fields = _object(line)
    stamp, blocks = fields.get("timestamp"), fields.get("hash_ids", [])
    if not isinstance(stamp, int | float) or isinstance(stamp, bool):
        raise _BadField(f"`timestamp` is `{stamp}` and no number of milliseconds")
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise _BadField("`hash_ids` is no list of whole numbers")
    num_in = _count("input_length", fields.get("input_length"))
    if blocks and len(blocks) != -(-num_in // BLOCK_TOKENS):
        raise _BadField(
            f"`hash_ids` has `{len(blocks)}` blocks of {BLOCK_TOKENS} tokens and `input_length` "
            f"is `{num_in}`"
        )
    return Arrival(
        due_s=stamp / 1e3,
        num_in=num_in,
        num_out=_count("output_length", fields.get("output_length")),
        prefix_blocks=tuple(blocks),
    )


def _penstock(line: str) -> Arrival | None:
    """A line of the log; None for one that tells of something else, or of a request that failed.

    The server logs a request when it ends, so it came `duration_s` before `time`. A log that keeps
    `prompt` or `messages` is replayed word for word, and then needs no counts.
    """
    fields = _object(line)
    prompt, messages = fields.get("prompt"), fields.get("messages")
    has_text = prompt is not None or messages is not None
    if not has_text and (fields.get("message") != "request" or "prompt_tokens" not in fields):
        return None
    if not has_text and not fields["prompt_tokens"]:
        return None  # it ended before its prompt was read
    if prompt is not None and not isinstance(prompt, str):
        raise _BadField("`prompt` is no text")
    if messages is not None and not (
        isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    ):
        raise _BadField("`messages` is no list of objects")
    duration_s = fields.get("duration_s", 0.0)
    if not isinstance(duration_s, int | float) or isinstance(duration_s, bool):
        raise _BadField(f"`duration_s` is `{duration_s}` and no number")
    user, num_out = fields.get("user"), fields.get("completion_tokens")
    return Arrival(
        due_s=_seconds("time", fields.get("time")) - duration_s,
        num_in=None if has_text else _count("prompt_tokens", fields["prompt_tokens"]),
        num_out=None if num_out is None else _count("completion_tokens", num_out) or None,
        session=user if isinstance(user, str) else None,
        prompt=prompt,
        messages=messages,
    )


_READERS: dict[str, Callable[[str], Arrival | None]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "penstock": _penstock,
}
KINDS = ("auto", *_READERS)


def _object(line: str) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise _BadField(f"it is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise _BadField("it is no JSON object")
    return fields


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _BadField(f"`{name}` is `{value}` and no number of tokens")
    return value


def _seconds(name: str, value: Any) -> float:
    """Seconds since 1970 of `2023-11-16 18:17:03.9799600`; UTC where no zone is named."""
    match = _STAMP.fullmatch(value) if isinstance(value, str) else None
    try:
        if match is None:
            raise ValueError
        zone = "+00:00" if match[3] in (None, "Z") else match[3]
        whole = datetime.fromisoformat(match[1] + zone).astimezone(UTC).timestamp()
    except ValueError:
        raise _BadField(f"`{name}` is `{value}` and no time") from None
    return whole + float(match[2] or 0)

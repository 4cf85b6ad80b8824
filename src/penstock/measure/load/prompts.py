"""Prompts with real text: a JSONL file of the user's, or a published set from the data directory.

Owns their forms; knows no schedule. A line holds `prompt` or `messages`, or is one of OpenAI's
batch format. A field that nothing would be done with is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec

from penstock.errors import ConfigError
from penstock.measure.load.target import Ask

_FIELDS = ("id", "prompt", "messages", "max_tokens", "temperature", "seed", "stop", "reference")
_OURS_IN_BODY = {"model", "stream", "stream_options"}  # decided by the run, not by a line


class _Line(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: str | int | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    reference: Any = None


def read_jsonl(path: Path) -> list[Ask]:
    """The prompts of a file.

    Raises:
        ConfigError: the file cannot be read, or a line of it; file, line and field are named.
    """
    asks = []
    for number, fields in _objects(path):
        batch = "body" in fields
        try:
            asks.append(_from_batch(fields, number) if batch else _from_line(fields, number))
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"`{path}`, line `{number}`: {error}.",
                hint=f"a line holds {', '.join(_FIELDS)}, or is one of OpenAI's batch format",
            ) from None
    if not asks:
        raise ConfigError(f"`{path}` holds no prompt.")
    return asks


def _objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = msgspec.json.decode(line.removeprefix(b"\xef\xbb\xbf"), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"`{path}`, line `{number}` is no JSON object: {error}.") from None
        found.append((number, fields))
    return found


def _from_line(fields: dict[str, Any], number: int) -> Ask:
    line = msgspec.convert(fields, _Line)
    if (line.prompt is None) == (line.messages is None):
        raise msgspec.ValidationError("it holds not exactly one of `prompt` and `messages`")
    return Ask(
        prompt_id=str(number if line.id is None else line.id),
        prompt=line.prompt,
        messages=line.messages,
        max_tokens=line.max_tokens,
        temperature=line.temperature,
        seed=line.seed,
        stop=[line.stop] if isinstance(line.stop, str) else line.stop,
        reference=line.reference,
    )


def _from_batch(fields: dict[str, Any], number: int) -> Ask:
    """A line of OpenAI's batch format; what is no field of ours is sent as it is."""
    body = fields["body"]
    if not isinstance(body, dict):
        raise msgspec.ValidationError("`body` is no object")
    body = {name: value for name, value in body.items() if name not in _OURS_IN_BODY}
    max_tokens = body.pop("max_completion_tokens", None)
    ours = {name: body.pop(name) for name in _FIELDS[1:-1] if name in body}
    if max_tokens is not None:
        ours["max_tokens"] = max_tokens
    ask = _from_line(ours | {"id": fields.get("custom_id")}, number)
    return msgspec.structs.replace(ask, extra=body)


class _Set(NamedTuple):
    path: str  # in the data directory
    make: Callable[[dict[str, Any]], tuple[Any, str, Any]]  # id, prompt, reference


def _first_turn(fields: dict[str, Any]) -> tuple[Any, str, Any]:
    return fields["question_id"], fields["turns"][0], (fields.get("reference") or [None])[0]


def _instruction(fields: dict[str, Any]) -> tuple[Any, str, Any]:
    instance = fields["instances"][0]
    text = "\n\n".join(part for part in (fields["instruction"], instance["input"]) if part)
    return fields["id"], text, instance["output"]


_SETS = {
    "mt-bench": _Set("prompts-mt-bench/mt_bench_question.jsonl", _first_turn),
    "vicuna": _Set("prompts-mt-bench/vicuna_bench_question.jsonl", _first_turn),
    "spec-bench": _Set("prompts-spec-bench/question.jsonl", _first_turn),
    "self-instruct": _Set("prompts-self-instruct/user_oriented_instructions.jsonl", _instruction),
    "gsm8k": _Set(
        "eval-gsm8k/test.jsonl", lambda fields: (None, fields["question"], fields["answer"])
    ),
    "cnn_dailymail": _Set(
        "eval-cnndm-sample/cnn_dailymail_tldr_summary.jsonl",
        lambda fields: (None, fields["prompt"], fields.get("completion")),
    ),
}
PUBLISHED = tuple(_SETS)


def path_of(name: str, data_dir: Path | None = None) -> Path:
    """Where a published set lies.

    Args:
        data_dir: where the sets lie; default: PENSTOCK_DATA.

    Raises:
        ConfigError: it is not known, or not there.
    """
    if name not in _SETS:
        raise ConfigError(f"`{name}` is no published set.", hint=f"known: {', '.join(_SETS)}")
    path = (data_dir or Path(os.environ.get("PENSTOCK_DATA") or "")) / _SETS[name].path
    if not path.is_file():
        raise ConfigError(
            f"The set `{name}` is not there: `{path}`.",
            hint="PENSTOCK_DATA names the directory of the published sets",
        )
    return path


def published(name: str, data_dir: Path | None = None) -> list[Ask]:
    """A published set of prompts; of a conversation only what is said first. See `path_of`."""
    asks = []
    for number, fields in _objects(path_of(name, data_dir)):
        found, prompt, reference = _SETS[name].make(fields)
        label = f"{name}-{number if found is None else found}"
        asks.append(Ask(prompt_id=label, prompt=prompt, reference=reference))
    return asks


def repeated(asks: Sequence[Ask], num: int, *, seed: int | str) -> list[Ask]:
    """`num` of them in an order that the seed decides; all are used before one is used again."""
    chance = Random(f"{seed}/order")
    chosen: list[Ask] = []
    while len(chosen) < num:
        chosen += chance.sample(list(asks), len(asks))
    return chosen[:num]

"""What a server is, and which optional fields it takes: found out before anything is measured.

Costs two or three GETs and one generated token where the server takes everything; one more token
for each optional field where it does not. Knows an endpoint only as `Probed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import msgspec

from penstock.errors import ConfigError
from penstock.measure.load.connection import HttpError
from penstock.measure.load.dialects import NEW_LIMIT, OPTIONAL, Route
from penstock.measure.load.target import Ask, Reply
from penstock.measure.records import Arm, Clock, Request

GET_TIMEOUT_S = 30.0
ROUTES: Sequence[Route] = ("openai-chat", "openai-completions", "tgi")
NUM_ATTEMPTS = 3  # of a probe that is told to come later
MAX_WAIT_S = 10.0
FEW = 16  # tokens where the limit is `max_completion_tokens`: fewer are refused there
# `owned_by` of a listed model: the engine, and where its version is.
ENGINES = {
    "penstock": ("penstock", "/version", "version"),
    "vllm": ("vllm", "/version", "version"),
    "sglang": ("sglang", "/get_server_info", "version"),
    "llamacpp": ("llama.cpp", "/props", "build_info"),
}
UNKNOWN = ("", "/version", "version")


class Probed(Protocol):
    """An endpoint, as far as it is needed here."""

    arm: Arm
    has_key: bool

    def use(self, route: Route, takes: Set[str]) -> None: ...

    def redact(self, text: str) -> str: ...

    async def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]: ...

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None: ...


class Identity(NamedTuple):
    """What a server says that it is; empty: it does not say."""

    model: str
    engine: str
    version: str
    has_openai: bool  # it lists models
    context_len: int | None = None  # tokens of prompt and answer; None: it does not say


async def identity(endpoint: Probed, base: str, root: str, model: str) -> Identity:
    """Ask what is served, and by what.

    Args:
        base: path of the API, such as `/v1`.
        root: path above it.
        model: the one that was named, or "".

    Raises:
        ConfigError: it does not answer, refuses the key, or it is not clear which model is meant.
    """
    status, document = await _get(endpoint, base + "/models")
    if status in (401, 403):
        raise ConfigError(
            f"`{endpoint.arm.target}` "
            f"{'refuses the key' if endpoint.has_key else 'wants a key'} (status `{status}`).",
            hint="name the variable that holds it with --api-key-env",
        )
    listed = _entries(document)
    owner = next((its for name, its in listed.items() if name == model or not model), "")
    engine, path, field = ENGINES.get(owner, UNKNOWN)
    if not listed or not engine:
        _, info = await _get(endpoint, root + "/info")
        if isinstance(info, dict) and isinstance(info.get("model_id"), str):
            name = model or info["model_id"]
            return Identity(name, "tgi", _text(info.get("version")), bool(listed))
    _, about = await _get(endpoint, root + path)
    version = _text(about.get(field)) if isinstance(about, dict) else ""
    name = model or _only(endpoint, list(listed))
    return Identity(name, engine, version, bool(listed), _context_len(document, name))


def _entries(document: Any) -> dict[str, str]:
    """Names and owners of the models in a listing."""
    return {entry["id"]: _text(entry.get("owned_by")) for entry in _models(document)}


def _models(document: Any) -> list[dict[str, Any]]:
    data = document.get("data") if isinstance(document, dict) else document  # Together: a list
    entries = data if isinstance(data, list) else []
    return [
        entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]


def _context_len(document: Any, model: str) -> int | None:
    """What the listing says of the model's context (penstock, vLLM: `max_model_len`)."""
    told = [one.get("max_model_len") for one in _models(document) if one["id"] == model]
    return told[0] if told and isinstance(told[0], int) and told[0] > 0 else None


def _only(endpoint: Probed, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise ConfigError(
            f"`{endpoint.arm.target}` does not list its models.", hint="name one with --model"
        )
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    raise ConfigError(
        f"`{endpoint.arm.target}` serves `{len(names)}` models: {shown}",
        hint="name one with --model",
    )


async def _get(endpoint: Probed, path: str) -> tuple[int, Any]:
    """Status and JSON document of GET; None where there is no JSON.

    Raises:
        ConfigError: there is no answer at all.
    """
    try:
        async with asyncio.timeout(GET_TIMEOUT_S):
            status, _, body = await endpoint.get(path)
    except TimeoutError:
        raise _silent(endpoint, f"nothing came within `{GET_TIMEOUT_S:g}` s") from None
    except HttpError as error:
        raise _silent(endpoint, str(error).rstrip(".")) from None
    try:
        return status, msgspec.json.decode(body) if status == 200 else None
    except (msgspec.DecodeError, UnicodeError):
        return status, None


def _silent(endpoint: Probed, why: str) -> ConfigError:
    return ConfigError(
        f"`{endpoint.arm.target}` does not answer: {why}.", hint="is the server running there?"
    )


async def settle(endpoint: Probed, named: Route | None) -> tuple[Route, frozenset[str], list[str]]:
    """Find a dialect that answers and the optional fields that it takes.

    Returns:
        The dialect, the fields, and sentences on what cannot be had.

    Raises:
        ConfigError: no dialect answers; the message is the first one's.
    """
    first: Request | None = None
    for route in ROUTES if named is None else (named,):
        everything = frozenset(OPTIONAL)
        row = await _try(endpoint, route, everything)
        if row.ok:
            return route, everything, _limits(route, everything, row)
        if row.http_status in (400, 422, 500):  # 500: an argument that its code does not know
            for plain in (frozenset[str](), frozenset({NEW_LIMIT})):
                if (await _try(endpoint, route, plain)).ok:
                    takes, row = await _one_by_one(endpoint, route, plain)
                    return route, takes, _limits(route, takes, row)
        first = first or row
        if row.http_status not in (400, 404, 405, 422, 501):
            break  # it is there, and has another trouble
    assert first is not None
    raise ConfigError(
        f"`{endpoint.arm.target}` gives no answer ({first.error_class}): {first.error}",
        hint=f"asked was for one token of model `{endpoint.arm.model}`",
    )


async def _one_by_one(
    endpoint: Probed, route: Route, takes: frozenset[str]
) -> tuple[frozenset[str], Request]:
    """Add each optional field that is not refused; the fields, and the last answer."""
    answered = Request()
    for name in OPTIONAL:
        row = await _try(endpoint, route, takes | {name})
        if row.ok:
            takes, answered = takes | {name}, row
    return takes, answered


async def _try(endpoint: Probed, route: Route, takes: frozenset[str]) -> Request:
    """Ask for as little as can be asked for."""
    endpoint.use(route, takes)
    num_tokens = FEW if NEW_LIMIT in takes else 1
    ask = Ask(prompt_id="probe", prompt="Hi", max_tokens=num_tokens, seed=0, fixed_length=True)
    for attempt in range(NUM_ATTEMPTS):
        row = Request()
        await endpoint.ask(ask, row, Clock())
        if row.http_status not in (429, 503) or attempt == NUM_ATTEMPTS - 1:
            break
        wait_s = 1.0 if row.retry_after_s is None else row.retry_after_s
        await asyncio.sleep(min(wait_s, MAX_WAIT_S))
    return row


def _limits(route: Route, takes: Set[str], row: Request) -> list[str]:
    """What cannot be had of a server with these fields, whose last probe was `row`."""
    if route == "tgi":
        return ["`/generate` cannot fix the length of an answer."]
    limits = [
        f"`{name}` is refused: {meaning}."
        for name, meaning in OPTIONAL.items()
        if name not in takes
    ]
    name = "stream_options.include_usage"
    if name in takes and row.n_out and row.count_source != "usage":
        limits.append(f"`{name}` is ignored: {OPTIONAL[name]}.")
    name = "stream_options.continuous_usage_stats"
    if name in takes and row.n_chunks and not row.chunk_n:
        limits.append(f"`{name}` is ignored: {OPTIONAL[name]}.")
    return limits


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

"""An arm that answers: a process of its own, an engine in this process, or somebody's server.

Owns what it starts and for how long. Knows recipes, not what is measured.
Invariant: no wait is without bound, and nothing that was started is left when the block ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.engines import recipes
from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec
from penstock.measure.engines.process import EngineFailed, EngineProcess, free_port
from penstock.measure.load.endpoint import Endpoint
from penstock.measure.load.target import Ask, Target
from penstock.measure.load.tokens import Counter, from_file
from penstock.measure.records import Arm, Clock, Request

READY_TIMEOUT_S = 600.0
FIRST_TOKEN_TIMEOUT_S = 300.0
STARTUP = "startup"  # the stage of the first answer
FIRST_PROMPT = "What is this"


@dataclass(slots=True, kw_only=True)
class Running:
    """An arm that answers.

    `startup`: seconds by phase, each from the end of the one before it: `port_s` (from the process
    being made until its port is open), `ready_s` (until it says that it is ready), `first_token_s`
    (until the first token of the first answer), and `total_s`, their sum. In process it is `load_s`
    in place of the first two. Empty for a URL.
    """

    spec: ArmSpec
    target: Target
    arm: Arm
    pid: int | None = None
    startup: dict[str, float] = field(default_factory=dict)
    first: Request | None = None  # the first answer's row; None for a URL
    url: str = ""  # of its server; empty in process
    log: Path | None = None
    counter: Counter | None = None  # of tokens, where the model's tokenizer lies here


@asynccontextmanager
async def launched(
    spec: ArmSpec,
    *,
    log_dir: Path,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = READY_TIMEOUT_S,
    clock: Clock | None = None,
    request_timeout_s: float = 600.0,
    max_connections: int | None = None,
) -> AsyncIterator[Running]:
    """Start what the arm names, until it answers; end it with the block.

    Args:
        log_dir: where the output of a started engine goes, as `<name>.log`.
        api_key: for a URL; an engine that is started here is asked for none.
        headers: more of them, for a URL.
        timeout_s: from the start until it is ready (`ready_timeout_s=` of the arm goes before it).
        clock: of the first answer's row.
        request_timeout_s: for a whole answer.

    Raises:
        ConfigError: the engine is not installed, or does not answer at its URL, or an option is
            wrong.
        EngineFailed: it died, was not ready in time, or did not answer.
    """
    clock = clock or Clock()
    endpoint = {"timeout_s": request_timeout_s, "max_connections": max_connections}
    if spec.kind == URL:
        running = await _connected(spec, api_key, {**endpoint, "headers": headers})
        try:
            yield running
        finally:
            await running.target.close()
    elif spec.kind == IN_PROCESS:
        running = await _in_process(spec, clock, request_timeout_s)
        try:
            yield running
        finally:
            await running.target.close()
    else:
        async with _started(spec, log_dir, timeout_s, clock, endpoint) as running:
            yield running


async def _connected(spec: ArmSpec, api_key: str | None, endpoint: dict[str, Any]) -> Running:
    """A server that runs already."""
    target = Endpoint(
        spec.location,
        model=spec.model,
        dialect=dialect_of(spec),  # type: ignore[arg-type]
        api_key=api_key,
        arm_name=spec.name,
        **endpoint,
    )
    try:
        await target.connect()
    except BaseException:
        await target.close()
        raise
    return _named(Running(spec=spec, target=target, arm=target.arm, url=spec.location))


async def _in_process(spec: ArmSpec, clock: Clock, timeout_s: float) -> Running:
    """penstock's engine on a thread of this process. Imports it, only now."""
    from penstock.measure.offline import InProcess

    started_s = time.perf_counter()
    target = InProcess.of(spec.location, spec.options, arm_name=spec.name, timeout_s=timeout_s)
    running = Running(spec=spec, target=target, arm=target.arm)
    try:
        await target.start()
        running.startup["load_s"] = time.perf_counter() - started_s
        await _first_answer(running, clock)
    except BaseException:
        await target.close()
        raise
    return _named(running)


@asynccontextmanager
async def _started(
    spec: ArmSpec, log_dir: Path, timeout_s: float, clock: Clock, endpoint: dict[str, Any]
) -> AsyncIterator[Running]:
    """A process of its own."""
    recipe = recipes.RECIPES[spec.kind]
    counter = _counter(spec)
    port = free_port(recipes.HOST)
    process = EngineProcess(
        recipe.name,
        recipes.command(spec, port),
        recipes.environment(spec),
        log_dir / f"{_file_name(spec.name)}.log",
    )
    target: Endpoint | None = None
    try:
        limit_s = _seconds(spec) or timeout_s
        startup = await process.ready(recipes.HOST, port, recipe.ready_path, limit_s)
        target = Endpoint(
            f"http://{recipes.HOST}:{port}",
            model=recipes.model_name(spec),
            dialect=dialect_of(spec),  # type: ignore[arg-type]
            arm_name=spec.name,
            count_tokens=None if counter is None else counter.count,
            **endpoint,
        )
        running = Running(
            spec=spec,
            target=target,
            arm=target.arm,
            pid=process.pid,
            startup=startup,
            log=process.log,
            url=f"http://{recipes.HOST}:{port}",
            counter=counter,
        )
        await _first_answer(running, clock, lambda: _connect(target, process))
        await _connect(target, process)
        if "dialect" not in spec.options:
            target.by_shape()
        running.arm = target.arm
        version = await asyncio.to_thread(recipes.version, spec)
        yield _named(running, version)
    finally:
        try:
            if target is not None:
                await target.close()
        finally:
            await process.end()


async def _connect(target: Endpoint, process: EngineProcess) -> None:
    try:
        await target.connect()
    except ConfigError as error:
        raise EngineFailed(
            f"The engine `{process.name}` cannot be asked: {error.message}", hint=process.words()
        ) from None


async def _first_answer(
    running: Running, clock: Clock, connect: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Ask for two tokens, and note when the first came.

    Args:
        connect: finds out what the target takes, if it refuses the usual question.

    Raises:
        EngineFailed: there is no answer.
    """
    begin_ns = clock.now_ns()
    row = await _ask_first(running, clock)
    if connect is not None and (row.error_class or "").startswith("http_4"):
        await connect()
        row = await _ask_first(running, clock)
    if not row.ok:
        raise EngineFailed(
            f"The engine `{running.spec.name}` is ready, but its first answer failed: "
            f"{row.error or row.error_class}"
        )
    at_ns = row.t_done_ns if row.t_first_ns is None else row.t_first_ns
    assert at_ns is not None
    running.startup["first_token_s"] = (at_ns - begin_ns) * 1e-9
    running.startup["total_s"] = sum(running.startup.values())
    running.first = row


async def _ask_first(running: Running, clock: Clock) -> Request:
    row = Request(arm=running.spec.name, stage=STARTUP, t_due_ns=clock.now_ns())
    is_chat = running.spec.is_started and dialect_of(running.spec) == "openai-chat"
    ask = Ask(
        prompt_id=STARTUP,
        prompt=None if is_chat else FIRST_PROMPT,
        messages=[{"role": "user", "content": FIRST_PROMPT}] if is_chat else None,
        max_tokens=2,
    )
    try:
        async with asyncio.timeout(FIRST_TOKEN_TIMEOUT_S):
            await running.target.ask(ask, row, clock)
    except TimeoutError:
        row.error_class, row.error = "timeout", f"no answer in {FIRST_TOKEN_TIMEOUT_S:g} s"
    return row


def dialect_of(spec: ArmSpec) -> str:
    """What an arm is asked in: as its option says, else its recipe; `auto` for a URL."""
    default = recipes.RECIPES[spec.kind].dialect if spec.is_started else "auto"
    return spec.options.get("dialect") or default


def _counter(spec: ArmSpec) -> Counter | None:
    """The tokenizer of a model that lies here; it counts where a server does not."""
    told = spec.options.get("tokenizer")
    place = Path(told) if told else Path(spec.location) / "tokenizer.json"
    return from_file(place) if told or place.is_file() else None


def _named(running: Running, version: str = "") -> Running:
    """Say in the arm what the recipe and the options know."""
    spec, arm = running.spec, running.arm
    arm.name, arm.target = spec.name, spec.text
    arm.precision = recipes.precision(spec) or arm.precision
    if spec.is_started:
        arm.engine = spec.kind
        arm.flags = recipes.flags(spec)
        arm.engine_version = version or arm.engine_version
    arm.engine = spec.options.get("engine") or arm.engine
    return running


def _seconds(spec: ArmSpec) -> float | None:
    told = spec.options.get("ready_timeout_s")
    try:
        return None if told is None else float(told)
    except ValueError:
        raise ConfigError(
            f"`ready_timeout_s` of the arm `{spec.text}` is `{told}`; it must be a number."
        ) from None


def _file_name(name: str) -> str:
    letters = (letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return "".join(letters)[:100]

"""From what a user wrote to a run: the target is reached or started, the header written, the load
begun, and everything closed again, also when it is interrupted.

The one place of `penstock bench` where settings become objects.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from penstock.errors import ConfigError
from penstock.measure.engines.arms import URL, ArmSpec, parse_arm
from penstock.measure.engines.launcher import Running, launched
from penstock.measure.engines.process import sigterm_cancels
from penstock.measure.load import tokens, words
from penstock.measure.load.bench import Bench, Meter, Price
from penstock.measure.load.endpoint import Endpoint, api_key, headers_of
from penstock.measure.load.progress import Progress
from penstock.measure.load.settings import LoadSettings
from penstock.measure.load.workload import Workload
from penstock.measure.meters import memory, prices
from penstock.measure.meters import settings as meter_settings
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.records import Header, Request
from penstock.measure.run import Writer, new_header

_LOCAL = ("127.0.0.1", "localhost", "::1")


class Refused(ConfigError):
    """Options that do not go with the target, which only the target could tell."""


class Session:
    """One command. `path` is the run's directory as soon as there is one."""

    def __init__(
        self,
        target: str,
        settings: LoadSettings,
        *,
        meters: MeterSettings,
        output: Path | None = None,
        sweep: dict[str, Any] | None = None,
        model: str | None = None,
        dialect: str = "auto",
        api_key_env: str | None = None,
        header_env: Sequence[str] = (),
        timeout: float = 600.0,
        provider: str | None = None,
        idle: float = 0.0,
    ) -> None:
        """Read and check all there is to read before anything is started.

        Raises:
            ConfigError: of the target, a file, or a combination.
        """
        self.path: Path | None = None
        self._spec = parse_arm(target)
        self._settings, self._meters, self._output = settings, meters, output
        self._sweep = sweep
        self._workload = Workload(settings)
        self._metered = meter_settings.prepare(meters)
        self._key, self._headers = api_key(api_key_env), headers_of(header_env)
        self._counter: tokens.Counter | None = None
        if settings.tokenizer is not None and self._workload.needs_words:
            self._counter = tokens.from_file(Path(settings.tokenizer))
        self._provider, self._idle_s = provider, idle
        self._timeout_s = timeout
        if self._spec.kind == URL:
            self._spec = _told(self._spec, model, dialect)
        elif model is not None or dialect != "auto":
            raise ConfigError("`--model` and `--dialect` go with a URL; an arm names its model.")
        elif api_key_env is not None or header_env:
            name = "--header-env" if api_key_env is None else "--api-key-env"
            raise ConfigError(f"`{name}` goes with a URL; an engine started here gets no key.")
        _check(meters, timeout=timeout, idle=idle)

    async def run(self, work: Callable[[Bench], Awaitable[None]]) -> None:
        """Reach the target, make the run, and let `work` use the bench.

        Raises:
            Refused: the load is more than the target's context holds.
            ConfigError: the target does not answer.
        """
        progress = Progress()
        doing = "Connecting to" if self._spec.kind == URL else "Starting"
        progress.say(f"{doing} {self._spec.name}.")
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as logs, ExitStack() as stack:
            stack.enter_context(sigterm_cancels())
            async with launched(
                self._spec,
                log_dir=Path(logs),
                api_key=self._key,
                headers=self._headers,
                request_timeout_s=self._timeout_s,
            ) as running:
                self._check_context(running)
                await self._count_words(running)
                price, found = self._price(running)
                with Writer(self._header(running, found), self._output) as writer:
                    self.path = writer.path
                    stack.callback(_keep_log, running, writer.path)
                    for limit in running.target.limits:
                        writer.mark("note", message=limit)
                    bench = Bench(
                        running.target,
                        self._workload,
                        writer,
                        meter=Meter(self._meters.meter_interval, _pid(running), self._idle_s),
                        price=price,
                        progress=progress,
                    )
                    try:
                        await work(bench)
                    finally:
                        progress.clear()

    def _check_context(self, running: Running) -> None:
        """Refuse made-up prompts that the server says it cannot take; of a trace, tell them."""
        most = running.target.context_len if isinstance(running.target, Endpoint) else None
        if most is None:
            return
        if self._workload.longest is not None and self._workload.longest > most:
            raise Refused(
                f"Prompts and answers of `{self._workload.longest}` tokens do not fit into the "
                f"context of `{running.arm.name}`, `{most}` tokens.",
                hint="make --random-input-len or --random-output-len smaller",
            )
        if num := self._workload.num_longer(most):
            self._workload.notes.append(
                f"{num} of {len(self._workload.trace)} requests of the trace are longer than the "
                f"server's context of {most} tokens: it will refuse them."
            )

    async def _count_words(self, running: Running) -> None:
        """Let a tokenizer say how many tokens words are: one that lies here, else the server's."""
        workload = self._workload
        if not workload.needs_words:
            return

        def find() -> tokens.Counter | None:
            if self._counter is not None:
                return self._counter
            if self._spec.kind == URL:
                return tokens.from_server(
                    self._spec.location,
                    model=running.arm.model or None,
                    api_key=self._key,
                    headers=self._headers,
                )
            return running.counter

        counter = await asyncio.to_thread(find)
        if counter is None:
            return
        try:
            workload.words = await asyncio.to_thread(words.measured, counter)
        except (OSError, HTTPException, ValueError, TypeError, KeyError) as error:
            workload.notes.append(f"{counter.source} failed and was not used: {error}.")
        finally:
            counter.close()

    def _header(self, running: Running, prices_used: dict[str, Any]) -> Header:
        return new_header(
            "bench",
            settings={
                **self._settings.as_facts(),
                **({} if self._sweep is None else {"sweep": self._sweep}),
                "slo": msgspec.to_builtins(self._settings.limits),
                "files": self._workload.files,
                "words": self._workload.words.source if self._workload.needs_words else None,
                "startup": running.startup,
                "notes": self._workload.notes,
                **self._metered,
            },
            arms=[running.arm],
            hashes=self._workload.hashes,
            prices=prices_used,
        )

    def _price(self, running: Running) -> tuple[Price | None, dict[str, Any]]:
        """How a request is priced, and the entry used; none where nobody is paid by token."""
        provider = self._provider or running.arm.provider
        if self._spec.kind == URL and not provider:
            provider = prices.provider_of(self._spec.location)
        if not provider:
            return None, {}
        running.arm.provider = provider
        path = Path(self._meters.prices) if self._meters.prices else None
        listed = prices.load(path, meter_settings.tables_dir(self._meters))
        found = listed.find(provider, running.arm.model)

        def set_cost(row: Request) -> None:
            prices.set_cost(row, found)

        return set_cost, {running.arm.name: found}


def _check(meters: MeterSettings, *, timeout: float, idle: float) -> None:
    if not 0 < timeout < math.inf:
        raise ConfigError(f"`--timeout {timeout:g}` is no number of seconds above 0.")
    if not 0 <= idle < math.inf:
        raise ConfigError(f"`--idle {idle:g}` is no number of seconds.")
    if idle and not meters.meter_interval:
        raise ConfigError("`--idle` measures a rest, and `--meter-interval 0` measures nothing.")


def _keep_log(running: Running, path: Path) -> None:
    """What an engine that was started here wrote, until its end, beside the records."""
    if running.log is not None:
        (path / "logs").mkdir(exist_ok=True)
        shutil.copy(running.log, path / "logs")


def _told(spec: ArmSpec, model: str | None, dialect: str) -> ArmSpec:
    """The arm with what other options say of it."""
    options = dict(spec.options)
    if dialect != "auto":
        options["dialect"] = dialect
    return replace(spec, model=model or spec.model, options=options)


def _pid(running: Running) -> int | None:
    """The server's process, where it is one of this machine."""
    if running.pid is not None or running.spec.kind != URL:
        return running.pid
    parts = urlsplit(running.spec.location)
    if parts.hostname not in _LOCAL or parts.port is None:
        return None
    return memory.listening_pid(parts.port)

"""From what a user wrote to a run: the target is reached or started, the header written, the load
begun, and everything closed again, also when it is interrupted.

The one place of `penstock bench` where settings become objects.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from penstock.errors import ConfigError
from penstock.measure.engines.arms import URL, ArmSpec, parse_arm
from penstock.measure.engines.launcher import Running, launched
from penstock.measure.load import tokens, words
from penstock.measure.load.bench import Bench, Meter, Price
from penstock.measure.load.endpoint import api_key
from penstock.measure.load.progress import Progress
from penstock.measure.load.settings import LoadSettings
from penstock.measure.load.workload import Workload
from penstock.measure.meters import memory, prices
from penstock.measure.meters import settings as meter_settings
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.records import Header, Request
from penstock.measure.run import Writer, new_header

_LOCAL = ("127.0.0.1", "localhost", "::1")


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
        self._key = api_key(api_key_env)
        self._provider, self._idle_s = provider, idle
        self._timeout_s = timeout
        if self._spec.kind == URL:
            self._spec = _told(self._spec, model, dialect)
        elif model is not None or dialect != "auto":
            raise ConfigError("`--model` and `--dialect` go with a URL; an arm names its model.")

    async def run(self, work: Callable[[Bench], Awaitable[None]]) -> None:
        """Reach the target, make the run, and let `work` use the bench."""
        progress = Progress()
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as logs:
            async with launched(
                self._spec,
                log_dir=Path(logs),
                api_key=self._key,
                request_timeout_s=self._timeout_s,
            ) as running:
                await self._count_words(running)
                price, found = self._price(running)
                with Writer(self._header(running, found), self._output) as writer:
                    self.path = writer.path
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

    async def _count_words(self, running: Running) -> None:
        """Let a tokenizer say how many tokens words are: one that lies here, else the server's."""
        workload, path = self._workload, self._settings.tokenizer
        if not workload.needs_words:
            return

        def find() -> tokens.Counter | None:
            if path is not None:
                return tokens.from_file(Path(path))
            if self._spec.kind == URL:
                model = running.arm.model or None
                return tokens.from_server(self._spec.location, model=model, api_key=self._key)
            return running.counter

        counter = await asyncio.to_thread(find)
        if counter is not None:
            workload.words = await asyncio.to_thread(words.measured, counter)
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

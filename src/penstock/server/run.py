"""`serve`: one engine, one server, from start to exit code.

Owns the order of things: bind, load, listen, and on a signal drain, stop, exit. SIGTERM or SIGINT
drains; a second one exits at once. The process imports no torch unless `engine_thread` is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from penstock.engine.client import EngineClient
from penstock.engine.config import EngineConfig
from penstock.engine.locate import locate
from penstock.errors import ConfigError
from penstock.hub import served_name
from penstock.server.app import create_app
from penstock.server.connection import bounded_protocol
from penstock.server.gate import Gate
from penstock.server.logs import configure_logging
from penstock.server.settings import ServerSettings
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer, load_tokenizer
from penstock.types import EngineInfo

logger = logging.getLogger("penstock.server")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 1024
_LAST_WRITES_S = 5  # for connections to close after the drain

Banner = Callable[[str, EngineInfo], None]
MakeClient = Callable[[EngineConfig], EngineClient]


def serve(
    config: EngineConfig,
    settings: ServerSettings,
    *,
    banner: Banner | None = None,
    make_client: MakeClient | None = None,
) -> int:
    """Serve a model until a signal comes. Returns the exit code: 0, or 1 if requests were cut.

    Args:
        banner: called with the URL and the engine's info once requests can come.
        make_client: another engine than a process of its own, or a thread of this one.

    Raises:
        ConfigError: before anything is loaded, if the address is taken or a setting is wrong.
        ModelLoadError, NotEnoughMemory: the model cannot be loaded.
    """
    configure_logging(settings.log_level)
    settings.keys()  # a wrong key file is told before a model is loaded
    config = locate(config)
    with contextlib.closing(_bind(settings)) as listener:
        server = _Server(config, settings, listener, banner, make_client or _client_maker(settings))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(server.run())


def default_model_name(config: EngineConfig) -> str:
    """What requests call the model unless `served_model_name` says otherwise.

    Raises:
        ConfigError: there is no such model.
    """
    return served_name(config.model)


def _client_maker(settings: ServerSettings) -> MakeClient:
    if settings.engine_thread:
        from penstock.engine.client import ThreadClient

        return ThreadClient
    from penstock.engine.process import ProcessClient

    return ProcessClient


def _bind(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot bind to `{settings.host}` port `{settings.port}`: {error.strerror}.",
            hint="choose another `--host` or `--port`",
        ) from None
    return listener


class _Server:
    """One run of `serve`."""

    def __init__(
        self,
        config: EngineConfig,
        settings: ServerSettings,
        listener: socket.socket,
        banner: Banner | None,
        make_client: MakeClient,
    ) -> None:
        self._config = config
        self._settings = settings
        self._listener = listener
        self._banner = banner
        self._make_client = make_client
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Load, serve, drain. Returns the exit code."""
        with self._signals():
            client = self._make_client(self._config)
            try:
                loaded = await self._load(client)
                return 0 if loaded is None else await self._serve(client, *loaded)
            finally:
                await client.shutdown()

    async def _load(self, client: EngineClient) -> tuple[Tokenizer, ChatTemplate | None] | None:
        """Start the engine, and meanwhile read the tokenizer. None: a signal came first."""
        start = asyncio.ensure_future(client.start())
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, self._config.path)
            template = ChatTemplate.for_tokenizer(tokenizer)
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return None
            await start
        finally:
            for task in (start, stop):
                task.cancel()
            # The engine may fail for the same reason as the tokenizer: one error is enough.
            await asyncio.gather(start, stop, return_exceptions=True)
        return tokenizer, template

    async def _serve(
        self, client: EngineClient, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> int:
        app = create_app(
            client,
            tokenizer,
            template,
            self._settings,
            default_model_name(self._config),
            honours_priority=self._config.scheduling_policy == "priority",
        )
        gate: Gate = app.state.service.gate
        server = _Uvicorn(self._uvicorn_config(app), lambda: self._ready(client.info))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        num_cut = 0
        if not serving.done():
            logger.info("draining", extra={"num_open": gate.num_open})
            num_cut = await gate.drain(self._settings.drain_timeout_s)
            server.should_exit = True
        await serving
        logger.info("stopped", extra={"num_cut": num_cut})
        return 1 if num_cut or client.dead is not None else 0

    def _uvicorn_config(self, app: object) -> uvicorn.Config:
        settings = self._settings
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=bounded_protocol(settings),
            ws="none",
            loop="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WRITES_S,
            backlog=_BACKLOG,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            ssl_keyfile_password=settings.ssl_keyfile_password,
            ssl_ca_certs=settings.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"The TLS files cannot be used: {error}.") from None
        return config

    def _ready(self, info: EngineInfo) -> None:
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._settings.ssl_certfile is None else "https"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        logger.info("listening", extra={"url": url, "model": info.model})
        if self._banner is not None:
            self._banner(url, info)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            os._exit(128 + number)  # the user insists; the engine's process ends with ours
        self._stop.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling, which would not drain."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

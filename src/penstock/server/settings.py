"""The settings of one server; `penstock.cli` makes its options from the fields.

Knows nothing of the engine. Limits are on by default, and the server binds to loopback.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_POSITIVE = (
    *("max_body_bytes", "max_bodies_bytes", "max_header_bytes", "max_connections"),
    *("max_queue_tokens", "max_choices", "max_inputs", "max_messages", "num_text_threads"),
    *("header_timeout_s", "body_timeout_s", "slow_reader_timeout_s"),
    *("keep_alive_s", "stall_timeout_s"),
)
LOG_LEVELS = ("debug", "info", "warning", "error")


def _option(default: Any, help: str, flag: str | None = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, "flag": flag, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How one engine is offered over HTTP.

    Raises:
        ConfigError: a value is out of range, or two values cannot be combined.
    """

    host: str = _option("127.0.0.1", "address to bind to; 0.0.0.0 = every interface")
    port: int = _option(8000, "port to bind to; 0 = any free one")
    served_model_name: tuple[str, ...] = _option(
        (), "name(s) that requests may use; default: the model's own name"
    )
    api_key: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={
            "help": "key(s) that requests must bring; default: none needed",
            "flag": "--api-key",
        },
    )
    api_key_file: str | None = _option(None, "file with one key a line")
    allow_anonymous: bool = _option(False, "serve other machines without a key")
    ssl_certfile: str | None = _option(None, "certificate chain (PEM): serve HTTPS")
    ssl_keyfile: str | None = _option(None, "its private key (PEM)")
    ssl_keyfile_password: str | None = field(
        default=None, repr=False, metadata={"help": "password of the key", "flag": None}
    )
    ssl_ca_certs: str | None = _option(None, "CA (PEM): clients must show a certificate of it")
    allowed_hosts: tuple[str, ...] = _option(
        (), "host names that requests may use; default: on loopback its names, else any"
    )
    max_body_bytes: int = _option(16 * 2**20, "largest request body")
    max_bodies_bytes: int = _option(
        256 * 2**20, "bodies of all open requests together; more get 429"
    )
    max_header_bytes: int = _option(16 * 2**10, "largest request head")
    header_timeout_s: float = _option(10.0, "seconds for a request's head to arrive")
    body_timeout_s: float = _option(30.0, "seconds for a request's body to arrive")
    max_connections: int = _option(1024, "connections open at the same time")
    max_queue: int = _option(256, "requests that may wait for the engine; more get 429")
    max_queue_tokens: int = _option(
        4_000_000, "prompt tokens of all open requests together; more get 429"
    )
    max_choices: int = _option(256, "answers of one HTTP request: prompts times n")
    max_inputs: int = _option(2048, "texts of one request for embeddings or scores")
    max_logprobs: int = _option(20, "most likely tokens reported at a position")
    max_messages: int = _option(4096, "messages of one chat request")
    max_stop_strings: int = _option(32, "stop strings of one request")
    request_timeout_s: float | None = _option(
        None, "seconds that a request may take in all; default: no end"
    )
    slow_reader_timeout_s: float = _option(
        30.0, "seconds that a client may leave a stream unread before it is cut"
    )
    keep_alive_s: float = _option(15.0, "seconds between comments while a stream waits to start")
    stall_timeout_s: float = _option(
        300.0, "seconds without an engine step while requests are open until /ready says 503"
    )
    drain_timeout_s: float = _option(
        30.0, "seconds for open requests to finish after SIGTERM", "--drain-timeout"
    )
    num_text_threads: int = _option(2, "threads that tokenize and render templates")
    engine_thread: bool = _option(False, "run the engine in this process, not in its own")
    log_level: str = _option("info", "what is logged to stderr", choices=LOG_LEVELS)
    log_requests: bool = _option(True, "one log line for each request, without its text")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:  # also refuses nan
                raise ConfigError(f"`{name}` is `{getattr(self, name)}`; it must be positive.")
        for name in ("max_queue", "max_logprobs", "max_stop_strings", "drain_timeout_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` is `{getattr(self, name)}`; it must not be negative.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"`port` is `{self.port}`; it must be in [0, 65535].")
        if self.request_timeout_s is not None and not 0 < self.request_timeout_s < math.inf:
            raise ConfigError(
                f"`request_timeout_s` is `{self.request_timeout_s}`; it must be positive."
            )
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"`log_level` is `{self.log_level}`; it must be of {LOG_LEVELS}.")
        if not (self.is_loopback or self.api_key or self.api_key_file or self.allow_anonymous):
            raise ConfigError(
                f"`host` is `{self.host}`, which other machines can reach, and no API key is set.",
                hint="set `--api-key-file FILE`, or say `--allow-anonymous`",
            )
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError(
                "`ssl_keyfile` or `ssl_ca_certs` is set without `ssl_certfile`.",
                hint="give the certificate too",
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach `host`."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() in LOOPBACK

    def hosts(self) -> frozenset[str] | None:
        """The host names that a request may have in `Host`; None: any.

        On loopback a page of another origin could reach the server through a name that resolves
        to 127.0.0.1 (DNS rebinding), so only the names of loopback pass.
        """
        if self.allowed_hosts:
            return frozenset(name.lower() for name in self.allowed_hosts)
        return LOOPBACK | {self.host.lower()} if self.is_loopback else None

    def keys(self) -> tuple[str, ...]:
        """All API keys, those of the file included.

        Raises:
            ConfigError: the file cannot be read, or a key is unfit for a header.
        """
        keys = list(self.api_key)
        if self.api_key_file is not None:
            try:
                text = Path(self.api_key_file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"`api_key_file` `{self.api_key_file}` cannot be read: {error}."
                ) from None
            in_file = [line.strip() for line in text.splitlines() if line.strip()]
            if not in_file:
                raise ConfigError(f"`api_key_file` `{self.api_key_file}` holds no key.")
            keys += in_file
        for key in keys:
            if (
                not key
                or len(key) > 512
                or not key.isascii()
                or not key.isprintable()
                or " " in key
            ):
                raise ConfigError(
                    "An API key is empty, too long, or has characters that no header can carry.",
                    hint="use up to 512 visible ASCII characters",
                )
        return tuple(keys)

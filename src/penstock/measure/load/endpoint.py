"""A server at a URL as a `Target`: OpenAI's chat completions and completions, and TGI.

Puts questions on the wire and makes rows of what comes back; what a server is and takes is found
out in `probes`. A key is in no message, no row and no arm. Every error is a row.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import msgspec

from penstock.errors import ConfigError
from penstock.measure.load import probes
from penstock.measure.load.answer import Answer
from penstock.measure.load.chunks import BadChunk, ServerError, error_of
from penstock.measure.load.connection import Exchange, HttpError, Timeouts
from penstock.measure.load.dialects import DIALECTS, USUAL, CannotSay, Dialect, Route
from penstock.measure.load.http import Client, origin_of
from penstock.measure.load.target import Ask, Reply, identify, output_hash
from penstock.measure.records import Arm, Clock, Request

DialectName = Literal["auto", "openai-chat", "openai-completions", "tgi"]
RETRIED = (429, 503)
MAX_RETRY_WAIT_S = 60.0
MAX_ERROR_CHARS = 400
_PATHS: dict[str, Route] = {
    "/chat/completions": "openai-chat",
    "/completions": "openai-completions",
    "/generate_stream": "tgi",
    "/generate": "tgi",
}
_SECRET_NAME = re.compile(r"key|token|secret|sig|passw|auth", re.IGNORECASE)
_RATE_LIMIT = re.compile(r"(x-)?ratelimit-")
_encode = msgspec.json.encode


def api_key(variable: str | None = None) -> str | None:
    """The key in the environment: of `variable`, else PENSTOCK_API_KEY, else OPENAI_API_KEY.

    Raises:
        ConfigError: `variable` is named and not set.
    """
    if variable is not None:
        if not os.environ.get(variable):
            raise ConfigError(f"The environment variable `{variable}` is not set.")
        return os.environ[variable]
    return os.environ.get("PENSTOCK_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def headers_of(pairs: Iterable[str]) -> dict[str, str]:
    """Headers from `NAME=VARIABLE`: their values are in the environment, and so in no command.

    Raises:
        ConfigError: one is no such pair, or its variable is not set.
    """
    headers = {}
    for pair in pairs:
        name, equals, variable = pair.partition("=")
        if not (name and equals and variable):
            raise ConfigError(
                f"`--header-env {name}` is no `NAME=VARIABLE`.", hint="such as `api-key=AZURE_KEY`"
            )
        if not os.environ.get(variable):
            raise ConfigError(f"The environment variable `{variable}` is not set.")
        headers[name] = os.environ[variable]
    return headers


def with_key(headers: Mapping[str, str], key: str | None) -> dict[str, str]:
    """Headers with the key as `Authorization`, unless they say that themselves."""
    has_own = any(name.lower() == "authorization" for name in headers)
    return dict(headers) | ({"Authorization": f"Bearer {key}"} if key and not has_own else {})


class Address(NamedTuple):
    """Where a server is. Paths end without a slash."""

    shown: str  # the URL without what may be secret
    root: str  # path of `/version`, `/info`, `/generate`
    base: str  # path of `/models`, `/chat/completions`
    query: str  # with its question mark, sent with every generation
    route: Route | None  # if the URL names one


def address_of(url: str) -> Address:
    """Read a URL with or without its version (`/v1`), or that of a route.

    Raises:
        ConfigError: it is none of http or https, or holds a password.
    """
    origin_of(url)
    parts = urlsplit(url)
    path, route = parts.path.rstrip("/"), None
    for ending, its in _PATHS.items():
        if path.endswith(ending):
            path, route = path.removesuffix(ending), its
            break
    version = re.search(r"/v\d", path)
    root = path[: version.start()] if version else path
    # A route that is named in full is where it is, with a version or without (Azure, Perplexity).
    is_whole = version is not None or route in ("openai-chat", "openai-completions")
    base = path if is_whole else path + "/v1"
    query = f"?{parts.query}" if parts.query else ""
    return Address(f"{parts.scheme}://{parts.netloc}{parts.path}", root, base, query, route)


class _Refused(Exception):
    """An answer of another status than success."""

    def __init__(self, status: int, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class Endpoint:
    """A server at a URL, as a `Target`.

    Use: `target = Endpoint(url); await target.connect(); reply = await target.ask(ask, row, clock);
    await target.close()`, all in one event loop. Without `connect`, `model` has to be given, and
    the usual fields are sent.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        dialect: DialectName = "auto",
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        first_byte_timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        arm_name: str = "",
        max_connections: int | None = None,
        retries: int = 0,
        probe: bool = True,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        """Args:
            url: with or without `/v1`; one that ends in `/chat/completions` names the dialect, too.
            model: None: the one that the server lists.
            dialect: auto: chat completions, else completions, else TGI, whichever answers.
            api_key: sent as `Authorization: Bearer`.
            timeout_s: for a whole answer, with the connecting.
            max_connections: more questions wait for a place, before their `t_sent_ns`.
            retries: after 429 and 503, waiting as `Retry-After` says, at most 60 s.
            probe: let `connect` ask for single tokens, to learn which fields the server takes.
            count_tokens: counts the tokens of an answer where the server does not.

        Raises:
            ConfigError: the URL or a header cannot be used.
        """
        address = address_of(url)
        self._address, self._dialect = address, dialect
        self._headers = with_key(headers or {}, api_key)
        self._secrets = _secrets_of((headers or {}).values(), address.query)
        if api_key:
            self._secrets.insert(0, api_key)
        self.has_key = bool(self._headers)
        self.context_len: int | None = None  # tokens of prompt and answer, where the server tells
        timeouts = Timeouts(connect_timeout_s, first_byte_timeout_s, idle_timeout_s, timeout_s)
        self.client = Client(url, timeouts=timeouts, max_connections=max_connections)
        self._retries, self._probe, self._count_tokens = retries, probe, count_tokens
        self._heads: dict[str, bytes] = {}
        named = address.route if dialect == "auto" else dialect
        self._named_route = named
        self.use(named or "openai-chat", USUAL)
        host = self.client.host
        self.arm = Arm(
            name=arm_name or model or host,
            target=address.shown,
            model=model or "",
            provider="" if _is_local(host) else host,
        )
        self._is_named = bool(arm_name)
        self.limits: list[str] = []
        self._head(address.base + "/models", "GET")  # a header that cannot be sent is found here

    def use(self, route: Route, takes: Set[str]) -> None:
        """Speak this dialect from now on, with these optional fields."""
        self._route: Route = route
        self._takes = takes

    @property
    def asks_in_chat(self) -> bool:
        """Whether a text prompt becomes the message of a user."""
        return self._route == "openai-chat"

    def by_shape(self) -> None:
        """From now on messages are a chat, and only a prompt is asked in the dialect named."""
        self._named_route = None

    async def connect(self) -> None:
        """Check that it answers, learn its model, engine and which fields it takes.

        Asks GET /models and /version (or /info), and, unless `probe` is off, for one token with all
        optional fields; only if that is refused, for one token with each of them.

        Raises:
            ConfigError: it does not answer, refuses the key, or serves no such model.
        """
        found = await probes.identity(self, self._address.base, self._address.root, self.arm.model)
        self.arm.model, self.arm.engine = found.model, found.engine
        self.arm.engine_version, self.context_len = found.version, found.context_len
        if not self._is_named:
            self.arm.name = found.model or self.arm.name
        if found.engine == "tgi" and self._named_route is None and not found.has_openai:
            self._named_route = "tgi"
        if self._probe:
            route, takes, self.limits = await probes.settle(self, self._named_route)
            self.use(route, takes)
        elif self._named_route is not None:
            self.use(self._named_route, USUAL)

    async def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of GET.

        Raises:
            HttpError: there is no answer.
        """
        body = bytearray()
        exchange = Exchange(lambda _, __, piece: body.extend(piece))
        await self.client.send(exchange, self._head(path, "GET"))
        return exchange.status, exchange.headers, bytes(body)

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        """See `Target.ask`. `row.details` gets `connect_s` where a connection had to be made,
        `resent` where a kept one was stale, and `rate_limit`, what the headers say of it."""
        try:
            identify(row, ask, self.arm)
            reply = await self._retried(ask, row, clock)
            row.output_hash = output_hash(reply.text)
            return reply
        except asyncio.CancelledError:
            self._fail(row, "cut", "The run ended before the answer.")
            raise
        except _Refused as error:
            self._fail(row, f"http_{error.status}", str(error))
        except HttpError as error:
            self._fail(row, error.failure.value, str(error))
        except ServerError as error:
            self._fail(row, "server", str(error))
        except (BadChunk, CannotSay) as error:
            self._fail(row, "protocol", str(error))
        except Exception as error:  # noqa: BLE001 - a row, and the run goes on
            self._fail(row, "protocol", f"{type(error).__name__}: {error}")
        finally:
            if row.t_done_ns is None:
                row.t_done_ns = clock.now_ns()
        return None

    def _fail(self, row: Request, error_class: str, message: str) -> None:
        row.error_class, row.error = error_class, self.redact(message)[:MAX_ERROR_CHARS]

    def redact(self, text: str) -> str:
        """A text without keys of the user: of headers and of the URL's query, too."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def _retried(self, ask: Ask, row: Request, clock: Clock) -> Reply:
        route = self._route_of(ask)
        dialect = DIALECTS[route]
        body = _encode(dialect.body(ask, self.arm.model, self._takes))
        path = dialect.stream_path if ask.stream else dialect.path
        base = self._address.root if dialect.is_below_root else self._address.base
        head = self._head(base + path + self._address.query, "POST")
        for attempt in range(self._retries + 1):
            try:
                return await self._once(dialect, head, body, row, clock)
            except _Refused as error:
                row.retry_after_s = error.retry_after_s
                if error.status not in RETRIED or attempt == self._retries:
                    raise
                wait_s = 0.5 * 2**attempt if error.retry_after_s is None else error.retry_after_s
            row.t_done_ns = None
            await asyncio.sleep(min(wait_s, MAX_RETRY_WAIT_S))
            row.retries += 1
        raise AssertionError

    def _route_of(self, ask: Ask) -> Route:
        """The dialect of a question: where none was named, its shape decides."""
        if self._named_route is None and self._route != "tgi":
            if ask.messages is not None:
                return "openai-chat"
            if isinstance(ask.prompt, list):
                return "openai-completions"
        return self._route

    async def _once(
        self, dialect: Dialect, head: bytes, body: bytes, row: Request, clock: Clock
    ) -> Reply:
        answer, rest = Answer(row, clock, dialect.parse), bytearray()

        def on_body(exchange: Exchange, t_ns: int, piece: bytes) -> None:
            if _is_stream(exchange):
                answer.feed(t_ns, piece)
            else:
                rest.extend(piece)

        exchange = Exchange(on_body)
        try:
            await self.client.send(exchange, head, body)
            if not 200 <= exchange.status < 300:
                retry_after_s = _retry_after_s(exchange.headers)
                raise _Refused(exchange.status, error_of(bytes(rest)), retry_after_s)
            if not _is_stream(exchange):
                answer.whole(bytes(rest))
            answer.check_end()
        finally:
            _note(row, exchange, clock)
            answer.count(self._count_tokens)
        return answer.reply()

    def _head(self, path: str, method: str) -> bytes:
        key = f"{method} {path}"
        if key not in self._heads:
            kind = {"Content-Type": "application/json"} if method == "POST" else {}
            self._heads[key] = self.client.head(method, path, kind | self._headers)
        return self._heads[key]

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def _is_stream(exchange: Exchange) -> bool:
    kind = exchange.headers.get("content-type", "").lower()
    return 200 <= exchange.status < 300 and kind.startswith("text/event-stream")


def _note(row: Request, exchange: Exchange, clock: Clock) -> None:
    """What the exchange knows, into the row; `t_sent_ns` stays that of the first sending."""
    if row.t_sent_ns is None and exchange.t_sent_ns is not None:
        row.t_sent_ns = clock.at_ns(exchange.t_sent_ns)
    if exchange.t_done_ns is not None:
        row.t_done_ns = clock.at_ns(exchange.t_done_ns)
    row.http_status = exchange.status or None
    if exchange.connect_s is not None:
        row.details["connect_s"] = exchange.connect_s
    if exchange.resent:
        row.details["resent"] = True
    limits = [(name, text) for name, text in exchange.headers.items() if _RATE_LIMIT.match(name)]
    if limits:
        row.details["rate_limit"] = {name: text[:200] for name, text in limits[:16]}


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` asks for, which it says as a number or as a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _secrets_of(headers: Iterable[str], query: str) -> list[str]:
    """What may not be repeated, long ones first: also the key of `Bearer KEY` alone."""
    found = {word for value in headers for word in (value, *value.split())}
    found |= {value for name, value in parse_qsl(query[1:]) if _SECRET_NAME.search(name)}
    return sorted((value for value in found if len(value) >= 8), key=len, reverse=True)


def _is_local(host: str) -> bool:
    """Whether a host has no name of its own: an address, or one without a dot."""
    return "." not in host or ":" in host or host.replace(".", "").isdigit()

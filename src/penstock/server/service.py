"""What every route works with: one engine, its text side, the limits and the metrics.

Made once by `create_app`; lives in `app.state.service`. There are no globals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from starlette.requests import Request

from penstock.engine.client import EngineClient
from penstock.errors import ContextTooLong, UnknownModel
from penstock.server.calls import Call
from penstock.server.gate import Gate
from penstock.server.limits import TextWorkers
from penstock.server.metrics import Metrics
from penstock.server.settings import ServerSettings
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

# Larger bodies and texts are handled in a thread; smaller ones take less time than the hand-over.
SMALL_BYTES = 16 * 2**10

T = TypeVar("T")


class TextLimit:
    """How long a text may be before anybody tokenizes it."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len

    @cached_property
    def max_bytes(self) -> int:
        """The bytes of the longest text that fits into the context."""
        tokenizer = self._tokenizer
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        return self._max_model_len * longest

    def check(self, num_bytes: int, field: str) -> None:
        """Refuse a text that cannot fit, however its bytes are cut into tokens.

        Raises:
            ContextTooLong: `num_bytes` is larger than `max_bytes`; a small text always passes.
        """
        if num_bytes > SMALL_BYTES and num_bytes > self.max_bytes:
            raise ContextTooLong(
                f"`{field}` has `{num_bytes}` bytes; the context of `{self._max_model_len}` tokens "
                f"holds `{self.max_bytes}` at most.",
                field=field,
                hint="shorten the prompt",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One engine as it is served."""

    client: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: ServerSettings
    model_names: tuple[str, ...]  # the first is the one that answers carry
    gate: Gate
    text_limit: TextLimit
    honours_priority: bool  # whether the engine's scheduling policy reads it
    workers: TextWorkers
    metrics: Metrics
    version: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: equal seeds give equal answers while it is the same."""
        info = self.client.info
        parts = (self.version, info.backend, info.dtype, info.quantization, info.kv_cache_dtype)
        return "-".join(("penstock", *(part for part in parts if part)))

    async def offload(self, body: bytes, work: Callable[[], T]) -> T:
        """Do work on a request with this body: in a thread if it is large.

        Raises:
            QueueFull: too much work waits already.
        """
        return work() if len(body) <= SMALL_BYTES else await self.workers.run(work)

    def check_model(self, name: str | None) -> str:
        """The name under which to answer.

        Raises:
            UnknownModel: another model is asked for.
        """
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise UnknownModel(
                f"The model `{name[:200]}` is not served here.",
                field="model",
                hint=f"served is `{self.model_names[0]}`",
            )
        return name


def service_of(request: Request) -> Service:
    """The service of the application that got this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def call_of(request: Request) -> Call:
    """The call that this request is."""
    call = request.scope["state"]["call"]
    assert isinstance(call, Call)
    return call


def body_of(request: Request) -> bytes:
    """The body, read whole by `BodyMiddleware`."""
    body = request.scope["state"]["body"]
    assert isinstance(body, bytes)
    return body

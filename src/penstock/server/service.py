"""What every route works with: one engine, its text side, the limits and the metrics.

Made once by `create_app`; lives in `app.state.service`. There are no globals.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from penstock.engine.client import EngineClient
from penstock.errors import UnknownModel
from penstock.server.calls import Call
from penstock.server.gate import Gate
from penstock.server.limits import TextWorkers
from penstock.server.metrics import Metrics
from penstock.server.settings import ServerSettings
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

# Larger bodies and texts are handled in a thread; smaller ones take less time than the hand-over.
SMALL_BYTES = 16 * 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One engine as it is served."""

    client: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: ServerSettings
    model_names: tuple[str, ...]  # the first is the one that answers carry
    gate: Gate
    workers: TextWorkers
    metrics: Metrics
    version: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: equal seeds give equal answers while it is the same."""
        return f"penstock-{self.version}-{self.client.info.dtype}"

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

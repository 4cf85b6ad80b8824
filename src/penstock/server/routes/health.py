"""GET /health, /ready, /metrics, /version.

/health says whether this process is worth keeping: 503 once its engine is dead for good. /ready
says whether requests should come here now. Neither needs a key.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from penstock.protocol.native import Health, Version
from penstock.server.failures import ENGINE_DEAD_RETRY_S
from penstock.server.metrics import CONTENT_TYPE
from penstock.server.routes.generation import encode_json, json_response
from penstock.server.service import service_of


async def health(request: Request) -> Response:
    """Whether the process can ever serve again."""
    dead = service_of(request).client.dead is not None
    return _health("engine_dead" if dead else None)


async def ready(request: Request) -> Response:
    """Whether a request would be served now."""
    return _health(service_of(request).gate.unready_reason())


def _health(reason: str | None) -> Response:
    if reason is None:
        return json_response(Health("ok"))
    return Response(
        encode_json(Health("unavailable", reason)),
        503,
        {"retry-after": str(ENGINE_DEAD_RETRY_S)},
        media_type="application/json",
    )


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)


async def version(request: Request) -> Response:
    """The version of penstock."""
    return json_response(Version(service_of(request).version))

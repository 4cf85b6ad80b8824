"""`create_app`: the HTTP application in front of one engine.

Puts the layers around the routes, from outside in: the call (id, log, errors), the limits of the
head, the key, the body, the route. Nothing here is global: two applications can live side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock import __version__
from penstock.engine.client import EngineClient
from penstock.errors import PenstockError
from penstock.server import openapi
from penstock.server.auth import AuthMiddleware
from penstock.server.calls import Call, CallMiddleware
from penstock.server.failures import HttpError, describe, to_response
from penstock.server.gate import Gate
from penstock.server.limits import BodyMiddleware, LimitsMiddleware, TextWorkers
from penstock.server.metrics import EngineView, Metrics
from penstock.server.routes import chat, completions, health, models, pooling, tokens
from penstock.server.service import Service, TextLimit, call_of
from penstock.server.settings import ServerSettings
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    settings: ServerSettings,
    model_name: str,
    *,
    honours_priority: bool = False,
) -> Starlette:
    """An application that serves `client`, which must have been started.

    Args:
        template: None: the chat route refuses every request.
        model_name: what requests call the model, unless `settings.served_model_name` says more.
        honours_priority: the engine's scheduling policy reads a request's `priority`.

    Raises:
        ConfigError: the settings name keys that cannot be read.
    """
    metrics = Metrics()
    gate = Gate(client, settings)
    metrics.watch_engine(EngineView(lambda: client.stats, lambda: gate.num_open))
    service = Service(
        client=client,
        tokenizer=tokenizer,
        template=template,
        settings=settings,
        model_names=settings.served_model_name or (model_name,),
        gate=gate,
        text_limit=TextLimit(tokenizer, client.info.max_model_len),
        honours_priority=honours_priority,
        workers=TextWorkers(settings.num_text_threads, settings.max_queue),
        metrics=metrics,
        version=__version__,
    )
    app = Starlette(
        routes=_routes(),
        middleware=_middleware(settings, metrics),
        exception_handlers={HTTPException: _http_error, PenstockError: _penstock_error},
        lifespan=_lifespan(service),
    )
    app.router.redirect_slashes = False  # a redirect would repeat the client's Host
    app.state.service = service
    return app


def _routes() -> list[Route]:
    document = msgspec.json.encode(openapi.document(__version__))

    async def describe_api(request: Request) -> Response:
        return Response(document, media_type="application/json")

    return [
        Route("/v1/chat/completions", chat.endpoint, methods=["POST"]),
        Route("/v1/completions", completions.endpoint, methods=["POST"]),
        Route("/v1/embeddings", pooling.embeddings, methods=["POST"]),
        Route("/v1/score", pooling.score, methods=["POST"]),
        Route("/v1/rerank", pooling.rerank, methods=["POST"]),
        Route("/rerank", pooling.rerank, methods=["POST"]),
        Route("/classify", pooling.classify, methods=["POST"]),
        Route("/v1/models", models.list_models),
        Route("/v1/models/{model:path}", models.get_model),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokens.tokenizer_info),
        Route("/health", health.health),
        Route("/ready", health.ready),
        Route("/metrics", health.metrics),
        Route("/version", health.version),
        Route("/openapi.json", describe_api),
    ]


def _middleware(settings: ServerSettings, metrics: Metrics) -> list[Middleware]:
    layers = [
        Middleware(
            CallMiddleware,
            metrics=metrics,
            routes=frozenset(route.path for route in _routes()),
            request_timeout_s=settings.request_timeout_s,
            log_requests=settings.log_requests,
        ),
        Middleware(LimitsMiddleware, settings=settings),
    ]
    if keys := settings.keys():
        layers.append(Middleware(AuthMiddleware, keys=keys))
    layers.append(Middleware(BodyMiddleware, settings=settings))
    return layers


def _lifespan(
    service: Service,
) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.workers.close()

    return lifespan


async def _penstock_error(request: Request, error: Exception) -> Response:
    call: Call = call_of(request)
    failure = describe(error, call.request_id)
    call.outcome = failure.code
    return to_response(failure)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"`{request.method}` `{request.url.path[:200]}` is not served here."
    headers = dict(error.headers or {})
    return await _penstock_error(
        request,
        HttpError(error.status_code, code, message, hint="see /openapi.json", headers=headers),
    )

"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from penstock.protocol.openai import Model, ModelList
from penstock.server.routes.generation import json_response
from penstock.server.service import Service, call_of, service_of


async def list_models(request: Request) -> Response:
    """Every name under which the model is served."""
    service = service_of(request)
    return json_response(ModelList([_model(service, name) for name in service.model_names]))


async def get_model(request: Request) -> Response:
    """One of them."""
    service = service_of(request)
    name = service.check_model(request.path_params["model"])
    call_of(request).route = "/v1/models/{model}"
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> Model:
    return Model(id=name, created=service.created, max_model_len=service.client.info.max_model_len)

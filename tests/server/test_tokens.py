"""/tokenize, /detokenize, /tokenizer_info, /v1/models, /version, /openapi.json."""

from __future__ import annotations

from typing import Any

import pytest
from server_fakes import BOS, CONTEXT, VOCAB, Harness, error_of

from penstock import __version__

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "Hi"}]


async def test_tokenize(api: Harness) -> None:
    body = (await api.post("/tokenize", prompt="Hi<|im_end|>")).json()
    assert body == {
        "count": 4,
        "max_model_len": CONTEXT,
        "tokens": [BOS, *b"Hi", 259],
        "token_strs": None,
    }
    body = (
        await api.post("/tokenize", prompt="Hi", add_special_tokens=False, return_token_strs=True)
    ).json()
    assert body["tokens"] == [*b"Hi"]
    assert body["token_strs"] == ["<0x48>", "<0x69>"]


async def test_messages(api: Harness) -> None:
    body = (await api.post("/tokenize", messages=HI)).json()
    await api.post("/v1/chat/completions", messages=HI)
    assert body["tokens"] == api.engine.requests[0].prompt_token_ids
    options: dict[str, Any] = {
        "add_generation_prompt": False,
        "chat_template_kwargs": {"mood": "glad"},
    }
    body = (await api.post("/tokenize", messages=HI, **options)).json()
    text = (await api.post("/detokenize", tokens=body["tokens"])).json()["prompt"]
    assert text == "<|im_start|>user [glad]\nHi<|im_end|>\n"
    for name, value in options.items():
        response = await api.post("/tokenize", prompt="Hi", **{name: value})
        assert error_of(response)["param"] == name


async def test_either_prompt_or_messages(api: Harness) -> None:
    assert error_of(await api.post("/tokenize"))["param"] == "prompt"
    assert error_of(await api.post("/tokenize", prompt="a", messages=HI))["param"] == "prompt"


async def test_detokenize(api: Harness) -> None:
    response = await api.post("/detokenize", tokens=[BOS, *"wö".encode()])
    assert response.json() == {"prompt": "<s>wö"}
    assert (await api.post("/detokenize", tokens=[])).json() == {"prompt": ""}
    for tokens in ([-1], [VOCAB], [2**70]):
        assert error_of(await api.post("/detokenize", tokens=tokens))["param"] == "tokens"


async def test_model(api: Harness) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert (await api.post(path, model="fake", **body)).status_code == 200
        assert (await api.post(path, model="other", **body)).status_code == 404


async def test_models(make_api: Any) -> None:
    api = make_api(served_model_name=("first", "org/second"))
    body = (await api.http.get("/v1/models")).json()
    assert [model["id"] for model in body["data"]] == ["first", "org/second"]
    body = (await api.http.get("/v1/models/org/second")).json()
    assert body["object"] == "model"
    assert body["max_model_len"] == CONTEXT
    response = await api.http.get("/v1/models/third")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert (await api.chat(model="org/second")).json()["model"] == "org/second"
    assert (await api.chat()).json()["model"] == "first"


async def test_version(api: Harness) -> None:
    assert (await api.http.get("/version")).json() == {"version": __version__}


async def test_openapi(api: Harness) -> None:
    """It lists every route, every reference in it resolves, and refused fields are not in it."""
    document = (await api.http.get("/openapi.json")).json()
    assert set(document["paths"]) == set(api.paths)
    schemas = document["components"]["schemas"]

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].removeprefix("#/components/schemas/") in schemas
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    assert "temperature" in schemas["ChatRequest"]["properties"]
    assert "tools" not in schemas["ChatRequest"]["properties"]
    assert "image_url" not in schemas["ContentPart"]["properties"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions/", 404, "not_found"),
    ],
)
async def test_what_is_not_served(
    api: Harness, method: str, path: str, status: int, code: str
) -> None:
    response = await api.http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code

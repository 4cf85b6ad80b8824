"""/v1/embeddings, /v1/score, /v1/rerank and /classify: over fake engines, and over real ones."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from server_fakes import (
    BOS,
    CONTEXT,
    VOCAB,
    Harness,
    PoolingClient,
    error_of,
    pooled_vector,
    run_site,
    until,
)
from tests.pooling_models import add_modules, bert_tokenizer, roberta_tokenizer, save

from penstock.server.openapi import document
from penstock.server.settings import ServerSettings
from penstock.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.anyio

Make = Callable[..., Harness]
EMBED, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"


def ids_of(text: str) -> list[int]:
    return [BOS, *text.encode()]


def numbers(text: str) -> list[float]:
    """As the fake engine embeds a text, in float32."""
    return list(struct.unpack("<4f", struct.pack("<4f", *pooled_vector(ids_of(text)))))


async def test_the_whole_answer(pooling_api: Harness) -> None:
    response = await pooling_api.post(EMBED, input=["Hi", "you"], model="fake")
    assert response.status_code == 200
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": numbers("Hi")},
            {"object": "embedding", "index": 1, "embedding": numbers("you")},
        ],
        "model": "fake",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("Hi", [ids_of("Hi")]),
        (["Hi"], [ids_of("Hi")]),
        (["Hi", "you"], [ids_of("Hi"), ids_of("you")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["<s>"], [[BOS, BOS]]),
    ],
)
async def test_inputs(pooling_api: Harness, given: Any, texts: list[list[int]]) -> None:
    response = await pooling_api.post(EMBED, input=given)
    assert response.status_code == 200
    assert [request.prompt_token_ids for request in pooling_api.engine.requests] == texts
    assert len(response.json()["data"]) == len(texts)


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ("", "input", "invalid_value"),
        ([], "input", "invalid_value"),
        ([[]], "input", "invalid_value"),
        (["a", ""], "input[1]", "invalid_value"),
        (["a", 5], "input", "invalid_value"),
        ([5, [6]], "input", "invalid_value"),
        ([-1], "input", "invalid_value"),
        ([VOCAB], "input", "invalid_value"),
        ([[1], [VOCAB]], "input[1]", "invalid_value"),
        ("x" * CONTEXT, "input", "context_length_exceeded"),
        ([7] * (CONTEXT + 1), "input", "context_length_exceeded"),
        ([7] * 10**6, "input", "context_length_exceeded"),
        (["a"] * 2049, "input", "invalid_value"),
        (None, "input", "invalid_value"),
        ({"a": 1}, "input", "invalid_value"),
        ([True], "input[0]", "invalid_value"),
        ([1.5], "input[0]", "invalid_value"),
        ([10**30], None, None),
    ],
)
async def test_hostile_inputs(pooling_api: Harness, given: Any, param: Any, code: Any) -> None:
    started_s = time.monotonic()
    response = await pooling_api.post(EMBED, input=given)
    assert time.monotonic() - started_s < 2
    assert response.status_code == 400
    if param is not None:
        error = error_of(response)
        assert (error["param"], error["code"]) == (param, code)
    assert not pooling_api.engine.requests
    assert pooling_api.app.state.service.gate.num_open == 0


async def test_encoding_formats(pooling_api: Harness) -> None:
    plain = (await pooling_api.post(EMBED, input="Hi", encoding_format="float")).json()
    packed = (await pooling_api.post(EMBED, input="Hi", encoding_format="base64")).json()
    assert plain["data"][0]["embedding"] == numbers("Hi")
    data = base64.b64decode(packed["data"][0]["embedding"])
    assert list(struct.unpack("<4f", data)) == numbers("Hi")
    response = await pooling_api.post(EMBED, input="Hi", encoding_format="hex")
    assert error_of(response)["param"] == "encoding_format"


async def test_dimensions(make_api: Make, pooling_api: Harness) -> None:
    response = await pooling_api.post(EMBED, input="Hi", dimensions=2)
    assert error_of(response)["param"] == "dimensions"
    api = make_api(PoolingClient(dimensions=(2, 3)))
    api.engine.vector_of = lambda ids: [0.6, 0.0, 0.8, 0.0]  # type: ignore[attr-defined]
    short = (await api.post(EMBED, input="Hi", dimensions=2)).json()["data"][0]["embedding"]
    assert short == [1.0, 0.0]
    for wrong in (0, -1, 1, 4, 10**9):
        response = await api.post(EMBED, input="Hi", dimensions=wrong)
        assert error_of(response)["param"] == "dimensions"
    api = make_api(PoolingClient(dimensions=()))
    for number in (1, 4):
        response = await api.post(EMBED, input="Hi", dimensions=number)
        assert len(response.json()["data"][0]["embedding"]) == number
    assert (await api.post(EMBED, input="Hi", dimensions=5)).status_code == 400


async def test_texts_are_lowercased_if_the_checkpoint_says_so(make_api: Make) -> None:
    engine = PoolingClient(prompts={"query": "ASK: "}, is_lowercased=True)
    api = make_api(engine)
    await api.post(EMBED, input="Hi", prompt_name="query")
    await api.post(EMBED, input=[72, 73])
    assert [request.prompt_token_ids for request in engine.requests] == [
        ids_of("ask: hi"),
        [72, 73],
    ]


async def test_a_request_has_a_bounded_number_of_tokens(make_api: Make) -> None:
    """Also where nobody else is served: what is tokenized and queued takes memory."""
    api = make_api(PoolingClient(), max_queue_tokens=20)
    for given in (["a" * 9] * 3, [[5] * 9] * 3):
        assert error_of(await api.post(EMBED, input=given))["param"] == "input"
    refused = await api.post(SCORE, text_1="a" * 9, text_2=["b" * 9, "c" * 9])
    assert error_of(refused)["param"] == "text_2"
    assert not api.engine.requests
    assert api.app.state.service.gate.num_open == 0
    assert (await api.post(EMBED, input="a" * 30)).status_code == 200


async def test_a_long_query_is_not_tokenized_for_every_document(make_api: Make) -> None:
    api = make_api(PoolingClient(labels=("score",)), max_body_bytes=2000)
    refused = await api.post(
        RERANK, query="a" * 1001, documents=["b", "c"], truncate_prompt_tokens=8
    )
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "query"
    assert not api.engine.requests


async def test_prompts(make_api: Make) -> None:
    engine = PoolingClient(prompts={"query": "ask: "})
    api = make_api(engine)
    await api.post(EMBED, input="Hi", prompt_name="query")
    await api.post(EMBED, input="Hi")
    assert [request.prompt_token_ids for request in engine.requests] == [
        ids_of("ask: Hi"),
        ids_of("Hi"),
    ]
    for given in ({"input": "Hi", "prompt_name": "x"}, {"input": [1], "prompt_name": "query"}):
        assert error_of(await api.post(EMBED, **given))["param"] == "prompt_name"
    usual = PoolingClient(prompts={"query": "ask: "}, default_prompt="query")
    await make_api(usual).post(EMBED, input=["Hi", "you"])
    assert usual.requests[1].prompt_token_ids == ids_of("ask: you")


async def test_truncation(pooling_api: Harness) -> None:
    long = "x" * 20000
    for keep, kept in ((-1, CONTEXT), (5, 5), (CONTEXT, CONTEXT)):
        response = await pooling_api.post(EMBED, input=long, truncate_prompt_tokens=keep)
        assert response.json()["usage"]["prompt_tokens"] == kept
    await pooling_api.post(EMBED, input=[1, 2, 3, 4], truncate_prompt_tokens=2)
    assert pooling_api.engine.requests[-1].prompt_token_ids == [3, 4]
    for wrong in (0, -2, CONTEXT + 1, 1):  # with 1 there is no room beside the first token
        response = await pooling_api.post(EMBED, input=long, truncate_prompt_tokens=wrong)
        assert error_of(response)["param"] == "truncate_prompt_tokens"


async def test_model(pooling_api: Harness) -> None:
    for path, body in (
        (EMBED, {"input": "Hi"}),
        (SCORE, {"text_1": "Hi", "text_2": "you"}),
        (RERANK, {"query": "Hi", "documents": ["you"]}),
    ):
        assert (await pooling_api.post(path, model="x", **body)).status_code == 404
        assert (await pooling_api.post(path, model="fake", **body)).json()["model"] == "fake"


async def test_users_are_logged_as_digests(
    pooling_api: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="penstock.server"):
        await pooling_api.post(EMBED, input=["Hi", "you"], user="Ada")
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert len(record.user) == 16  # type: ignore[attr-defined]
    assert "Ada" not in str(record.__dict__)
    assert record.num_answers == 2  # type: ignore[attr-defined]
    assert record.prompt_tokens == 7  # type: ignore[attr-defined]


async def test_scores(pooling_api: Harness) -> None:
    def cosine(first: str, second: str) -> float:
        return float(np.dot(numbers(first), numbers(second)))

    one = (await pooling_api.post(SCORE, text_1="Hi", text_2="you")).json()
    assert set(one) == {"id", "object", "created", "model", "data", "usage"}
    assert one["object"] == "list"
    assert one["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    (score,) = one["data"]
    assert (score["index"], score["object"]) == (0, "score")
    assert score["score"] == pytest.approx(cosine("Hi", "you"), abs=1e-6)
    for body in (
        {"text_1": "Hi", "text_2": ["you", "me"]},
        {"queries": "Hi", "documents": ["you", "me"]},
        {"queries": ["Hi"], "text_2": ["you", "me"]},
    ):
        many = (await pooling_api.post(SCORE, **body)).json()["data"]
        expected = [cosine("Hi", "you"), cosine("Hi", "me")]
        assert [score["score"] for score in many] == pytest.approx(expected, abs=1e-6)
    each = (await pooling_api.post(SCORE, text_1=["a", "bb"], text_2=["a", "c"])).json()["data"]
    expected = [1.0, cosine("bb", "c")]
    assert [score["score"] for score in each] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"text_1": "a", "queries": "b", "text_2": "c"}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ({"queries": ["a", "b"], "documents": ["c", "d", "e"]}, "queries"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": [], "text_2": "a"}, "text_1"),
        ({"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
        ({"text_1": "a", "text_2": ["b", "x" * CONTEXT]}, "text_2[1]"),
        ({"text_1": "a", "text_2": [5]}, "text_2[0]"),
    ],
)
async def test_wrong_scores(pooling_api: Harness, body: dict[str, Any], param: str) -> None:
    response = await pooling_api.post(SCORE, **body)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith(param)


@pytest.fixture(scope="module")
def pairs_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    bert_tokenizer().save_pretrained(path)
    return load_tokenizer(path)


async def test_ranking(pairs_tokenizer: Any) -> None:
    """A classifier reads query and document at once; the second text has a type of its own."""
    engine = PoolingClient(labels=("relevant",))
    engine.vector_of = lambda ids: [len(ids) / 64]
    api = Harness(engine, tokenizer=pairs_tokenizer)
    documents = ["dog", {"text": "the dog runs"}, "the dog", {"text": "a fox"}, ""]
    body: dict[str, Any] = {"query": "fox", "documents": documents}
    whole = (await api.post(RERANK, **body)).json()
    assert set(whole) == {"id", "model", "results", "usage"}
    assert whole["results"] == [
        {"index": 1, "relevance_score": 7 / 64, "document": {"text": "the dog runs"}},
        {"index": 2, "relevance_score": 6 / 64, "document": {"text": "the dog"}},
        {"index": 3, "relevance_score": 6 / 64, "document": {"text": "a fox"}},
        {"index": 0, "relevance_score": 5 / 64, "document": {"text": "dog"}},
        {"index": 4, "relevance_score": 4 / 64, "document": {"text": ""}},
    ]
    assert {request.second_start for request in engine.requests} == {3}
    assert whole["usage"]["total_tokens"] == sum(len(r.prompt_token_ids) for r in engine.requests)
    for top_n, number in ((1, 1), (3, 3), (0, 5), (99, 5)):
        few = (await api.post("/rerank", **body, top_n=top_n)).json()["results"]
        assert few == whole["results"][:number]
    bare = (await api.post(RERANK, **body, return_documents=False)).json()["results"]
    assert bare[0] == {"index": 1, "relevance_score": 7 / 64}
    for wrong, param in (({"top_n": -1}, "top_n"), ({"documents": []}, "documents")):
        assert error_of(await api.post(RERANK, **body | wrong))["param"] == param
    short = await api.post(RERANK, **body, truncate_prompt_tokens=5)
    assert short.json()["usage"]["total_tokens"] == 4 + 4 * 5
    await api.close()


async def test_labels(labels_api: Harness) -> None:
    assert isinstance(labels_api.engine, PoolingClient)
    labels_api.engine.vector_of = lambda ids: [0.25, 0.75] if len(ids) == 3 else [0.5, 0.5]
    answer = (await labels_api.post("/classify", input=["Hi", "you"])).json()
    assert answer["data"] == [
        {"index": 0, "label": "yes", "probs": [0.25, 0.75], "num_classes": 2},
        {"index": 1, "label": "no", "probs": [0.5, 0.5], "num_classes": 2},
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    response = await labels_api.post(SCORE, text_1="a", text_2="b")
    assert response.status_code == 400
    assert "`2` labels" in error_of(response)["message"]


async def test_routes_of_other_servers(
    api: Harness, pooling_api: Harness, labels_api: Harness
) -> None:
    """One sentence says what this server does."""
    for harness, path, told in (
        (api, EMBED, "writes text"),
        (api, RERANK, "writes text"),
        (pooling_api, "/v1/chat/completions", "embeds texts"),
        (pooling_api, "/v1/completions", "embeds texts"),
        (pooling_api, "/classify", "has no labels"),
        (labels_api, "/v1/chat/completions", "scores texts"),
        (labels_api, EMBED, "has no embeddings"),
    ):
        body = {"input": "a", "model": "fake"} if path in (EMBED, "/classify") else {}
        response = await harness.post(path, **body)
        assert response.status_code == 400
        error = error_of(response)
        assert error["code"] == "wrong_route"
        assert told in error["message"]
        assert "Hint: use /v1/" in error["message"]


async def test_other_routes_work(pooling_api: Harness) -> None:
    assert (await pooling_api.http.get("/health")).status_code == 200
    assert (await pooling_api.http.get("/ready")).status_code == 200
    (model,) = (await pooling_api.http.get("/v1/models")).json()["data"]
    assert model["max_model_len"] == CONTEXT
    assert (await pooling_api.post("/tokenize", prompt="Hi")).json()["count"] == 3
    await pooling_api.post(EMBED, input=["a", "b", "c"])
    text = (await pooling_api.http.get("/metrics")).text
    assert 'penstock_answers_total{finish="pooled"} 3.0' in text
    assert 'penstock_requests_total{outcome="ok",route="/v1/embeddings"} 1.0' in text
    assert 'penstock_request_seconds_count{route="/v1/embeddings"} 1.0' in text


async def test_a_full_queue(make_api: Make) -> None:
    """A request counts once, whatever its number of texts, and with all its tokens."""
    engine = PoolingClient()
    engine.hold_after = 0
    api = make_api(engine, max_queue=1, max_queue_tokens=40)
    open_calls = [asyncio.create_task(api.post(EMBED, input=["abcd"] * 3)) for _ in range(2)]
    await until(lambda: len(engine.requests) == 6)
    response = await api.post(EMBED, input=["abcd"] * 3)
    assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    engine.go.set()
    assert {(await call).status_code for call in open_calls} == {200}
    assert api.app.state.service.gate.num_open == 0


async def test_a_client_that_leaves() -> None:
    engine = PoolingClient()
    engine.hold_after = 0
    async with (
        run_site(engine, ServerSettings(port=0)) as site,
        httpx.AsyncClient(base_url=site.url) as http,
    ):
        with pytest.raises(httpx.ReadTimeout):
            await http.post(EMBED, json={"input": ["a"] * 5}, timeout=0.3)
        await until(lambda: len(engine.aborted) == 5)
        assert not engine.live
        assert site.app.state.service.gate.num_open == 0


async def test_engine_death(make_api: Make) -> None:
    engine = PoolingClient()
    engine.hold_after = 0
    api = make_api(engine)
    call = asyncio.create_task(api.post(EMBED, input=["a", "b"]))
    await until(lambda: len(engine.requests) == 2)
    engine.die("a test")
    response = await call
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
    assert (await api.http.get("/health")).status_code == 503
    assert (await api.post(EMBED, input="a")).status_code == 503
    assert not engine.live


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
async def test_what_is_not_finite_is_an_error(make_api: Make, number: float) -> None:
    engine = PoolingClient()
    engine.vector_of = lambda ids: [1.0, number if len(ids) == 4 else 0.0, 0.0, 0.0]
    api = make_api(engine)
    response = await api.post(EMBED, input=["Hi", "you"])
    assert response.status_code == 500
    assert "`input[1]` is not finite" in error_of(response)["message"]
    assert (await api.post(EMBED, input="Hi")).status_code == 200
    assert (await api.post(SCORE, text_1="Hi", text_2="you")).status_code == 500


async def test_keys(make_api: Make) -> None:
    api = make_api(PoolingClient(), api_key=("one",))
    for path in (EMBED, SCORE, RERANK, "/rerank", "/classify"):
        assert (await api.post(path, input="a")).status_code == 401
    headers = {"authorization": "Bearer one"}
    response = await api.http.post(EMBED, json={"input": "a"}, headers=headers)
    assert response.status_code == 200


async def test_the_official_client() -> None:
    """It asks for base64 by default."""
    async with run_site(PoolingClient(), ServerSettings(port=0)) as site:
        base_url = site.url + "/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
            answer = await client.embeddings.create(model="fake", input=["Hi", "you"])
            assert [item.embedding for item in answer.data] == [numbers("Hi"), numbers("you")]
            assert answer.usage.prompt_tokens == 7
            plain = await client.embeddings.create(
                model="fake", input=[1, 2], encoding_format="float"
            )
            assert len(plain.data[0].embedding) == 4
            with pytest.raises(openai.BadRequestError) as bad:
                await client.embeddings.create(model="fake", input="a", dimensions=3)
            assert bad.value.param == "dimensions"


def test_the_document_has_the_routes() -> None:
    paths = document("0")["paths"]
    assert {EMBED, SCORE, RERANK, "/rerank", "/classify"} <= set(paths)


def test_serve_an_embedding_model(tmp_path: Path) -> None:
    """The whole house: `penstock serve` in one process, its engine in another."""
    tokenizer = bert_tokenizer()
    model = save(tmp_path, "BertModel", tokenizer)
    add_modules(tmp_path)
    texts = ["a quick brown fox", "the river was cold"] * 20
    with serving(tmp_path) as (url, banner):
        assert banner["pooling"]["kind"] == "mean"
        client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
        answer = client.embeddings.create(model=tmp_path.name, input=texts)
        for text, item in zip(texts, answer.data, strict=True):
            with torch.no_grad():
                hidden = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
            expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
            assert np.abs(np.array(item.embedding) - expected).max() < 1e-4
        assert httpx.get(url + "/ready").status_code == 200


def test_serve_a_reranker(tmp_path: Path) -> None:
    tokenizer = roberta_tokenizer()
    model = save(tmp_path, "XLMRobertaForSequenceClassification", tokenizer, num_labels=1)
    documents = ["the river", "a fox runs", "the quick dog jumps over the bank"]
    with serving(tmp_path) as (url, _):
        body = {"query": "a quick fox", "documents": documents}
        results = httpx.post(url + RERANK, json=body).json()["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert sorted(scores.values(), reverse=True) == [r["relevance_score"] for r in results]
    for index, text in enumerate(documents):
        given = tokenizer([["a quick fox", text]], return_tensors="pt")
        with torch.no_grad():
            theirs = model(given["input_ids"]).logits.sigmoid()
        assert abs(scores[index] - float(theirs)) < 1e-4


class serving:
    """`penstock serve` of a directory: its URL and what it prints."""

    def __init__(self, path: Path) -> None:
        code = "from penstock.cli.main import main; main()"
        command = [sys.executable, "-c", code, "serve", str(path), "--json", "--port", "0"]
        self._child = subprocess.Popen(
            [*command, "--num-threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> tuple[str, dict[str, Any]]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, self._child.communicate()[1]
        banner = json.loads(line)
        return banner["url"], banner

    def __exit__(self, *error: object) -> None:
        self._child.send_signal(signal.SIGTERM)
        self._child.communicate(timeout=30)
        assert self._child.returncode == 0

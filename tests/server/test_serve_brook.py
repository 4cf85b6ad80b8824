"""The whole house: `penstock serve brook` as a process, its engine in another, real clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_fakes import decode_stream, error_of

CHAT = "/v1/chat/completions"
STORY = [{"role": "user", "content": "Tell me a story."}]
SERVE = "from penstock.cli.main import main; main()"


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable,
        "-c",
        SERVE,
        "serve",
        "brook",
        "--json",
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    child = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, child.communicate()[1]
    return child, json.loads(line)["url"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    child, url = start()
    yield url
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 0


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


def ask(http: httpx.Client, **body: Any) -> Any:
    response = http.post(CHAT, json={"messages": STORY, "max_tokens": 40, **body})
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize("body", [{"temperature": 0}, {"seed": 3}, {"seed": 4, "stop": ["."]}])
def test_a_stream_joined_is_the_whole_answer(http: httpx.Client, body: dict[str, Any]) -> None:
    whole = text_of(ask(http, **body))
    request = {"messages": STORY, "max_tokens": 40, "stream": True, **body}
    streamed = decode_stream(http.post(CHAT, json=request).content)
    assert streamed.done
    joined = "".join(e["choices"][0]["delta"].get("content", "") for e in streamed.events)
    assert joined == whole
    assert whole


def test_a_seeded_answer_is_the_same_alone_and_among_others(http: httpx.Client) -> None:
    alone = text_of(ask(http, seed=7, n=1))
    with ThreadPoolExecutor(16) as pool:
        seeds = [7 if number % 4 == 0 else 100 + number for number in range(16)]
        answers = list(pool.map(lambda seed: text_of(ask(http, seed=seed)), seeds))
    assert {answer for seed, answer in zip(seeds, answers, strict=True) if seed == 7} == {alone}
    assert len(set(answers)) > 4


def test_loglikelihood_of_what_it_would_say(http: httpx.Client) -> None:
    """lm-evaluation-harness's request: the greedy continuation is found greedy, another is not."""
    body: dict[str, Any] = {"prompt": "One day", "temperature": 0, "max_tokens": 12}
    said = http.post("/v1/completions", json={**body, "return_token_ids": True}).json()
    prompt, answer = (said["choices"][0][name] for name in ("prompt_token_ids", "token_ids"))
    other = [*answer[:-1], (answer[-1] + 1) % 2000]
    scored = http.post(
        "/v1/completions",
        json={
            "prompt": [prompt + answer, prompt + other],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ).json()
    greedy = []
    for choice in scored["choices"]:
        lists = choice["logprobs"]
        assert len(lists["token_logprobs"]) == len(prompt) + len(answer) + 1
        own = lists["token_logprobs"][len(prompt) : -1]
        tops = lists["top_logprobs"][len(prompt) : -1]
        greedy.append(all(a == max(b.values()) for a, b in zip(own, tops, strict=True)))
    assert greedy == [True, False]


def test_answers_share_the_prompt(http: httpx.Client) -> None:
    """Of n answers one computes the prompt; the others find it in the prefix cache."""

    def hits() -> float:
        for line in http.get("/metrics").text.splitlines():
            if line.startswith("penstock_prefix_cache_hit_tokens_total"):
                return float(line.split()[1])
        raise AssertionError("no such metric")

    before = hits()
    long = [{"role": "user", "content": "fresh words " * 40}]
    answer = ask(http, messages=long, n=4, seed=1, max_tokens=4)
    blocks = answer["usage"]["prompt_tokens"] // 16
    assert hits() - before >= 3 * 16 * (blocks - 1) > 0


def test_the_official_client(url: str) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        messages: Any = STORY
        answer = client.chat.completions.create(
            model="brook", messages=messages, max_tokens=8, n=2, logprobs=True, top_logprobs=2
        )
        assert len(answer.choices) == 2
        stream = client.chat.completions.create(
            model="brook", messages=messages, max_tokens=8, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="brook", prompt="x " * 5000)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_the_engine_may_be_a_thread() -> None:
    child, url = start("--engine-thread")
    try:
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert not children
        with httpx.Client(base_url=url, timeout=60) as http:
            assert text_of(ask(http, temperature=0))
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
        assert child.returncode == 0
    finally:
        child.kill()
        child.communicate()


def test_a_killed_engine() -> None:
    """Open requests are told why; /ready turns 503; the server itself still answers."""
    child, url = start()
    try:
        (engine,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        body = {"messages": STORY, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            http.stream("POST", CHAT, json=body) as response,
        ):
            pieces = response.iter_bytes()
            received = next(pieces)
            os.kill(int(engine), signal.SIGKILL)
            streamed = decode_stream(received + b"".join(pieces))
            assert not streamed.done
            error = streamed.events[-1]["error"]
            assert error["code"] == "engine_dead"
            assert "SIGKILL" in error["message"] or "signal 9" in error["message"]
            with httpx.Client(base_url=url) as other:
                assert other.get("/ready").json()["reason"] == "engine_dead"
                refused = other.post(CHAT, json={"messages": STORY})
                assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_dead")
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
        assert child.returncode == 1
    finally:
        child.kill()
        child.communicate()

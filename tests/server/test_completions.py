"""POST /v1/completions, and the contract of lm-evaluation-harness."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from server_fakes import BOS, EOS, Harness, error_of, logprob_of, says

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


async def test_an_answer(api: Harness) -> None:
    body = (await api.complete("Hi", max_tokens=100)).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hello, wörld!",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["prompt_tokens"] == 3
    assert api.engine.requests[0].prompt_token_ids == [BOS, *b"Hi"]


async def test_sixteen_tokens_by_default(api: Harness) -> None:
    await api.complete()
    assert api.engine.requests[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("Hi", [[BOS, *b"Hi"]]),
        (["a", "bc"], [[BOS, *b"a"], [BOS, *b"bc"]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("<|im_end|>", [[BOS, 259]]),  # the whole input is the user's: special tokens are parsed
    ],
)
async def test_prompts(api: Harness, prompt: Any, wanted: list[list[int]]) -> None:
    body = (await api.complete(prompt)).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(len(wanted)))
    assert sorted(r.prompt_token_ids for r in api.engine.requests) == sorted(wanted)
    assert body["usage"]["prompt_tokens"] == sum(map(len, wanted))


@pytest.mark.parametrize(
    "prompt", [[], [[]], "", [""], ["a", 1], [1, [2]], [1, -1], [260], [[260]]]
)
async def test_bad_prompts(api: Harness, prompt: Any) -> None:
    response = await api.complete(prompt, add_special_tokens=False)
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


async def test_add_special_tokens(api: Harness) -> None:
    await api.complete("Hi", add_special_tokens=False)
    assert api.engine.requests[0].prompt_token_ids == [*b"Hi"]


async def test_several_prompts_with_several_answers(api: Harness) -> None:
    """Choices are ordered by prompt, then sample."""

    def script(request: Any) -> Any:
        prompt = bytes(request.prompt_token_ids[1:]).decode()
        return says(f"{prompt}{request.params.seed}")(request)

    api.engine.script = script
    body = (await api.complete(["a", "b"], n=2, seed=5)).json()
    assert [c["text"] for c in body["choices"]] == ["a5", "a6", "b5", "b6"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 4


async def test_too_many_answers(make_api: Any) -> None:
    api = make_api(max_choices=3)
    assert error_of(await api.complete(["a"] * 4))["param"] == "prompt"
    assert error_of(await api.complete(["a"] * 2, n=2))["param"] == "n"


async def test_echo(api: Harness) -> None:
    body = (await api.complete("<|im_end|>Hi", echo=True, max_tokens=3)).json()
    assert body["choices"][0]["text"] == "<|im_end|>HiHel"  # a text comes back as it was
    body = (await api.complete([BOS, *b"Hi"], echo=True, max_tokens=3)).json()
    assert body["choices"][0]["text"] == "HiHel"


@pytest.mark.parametrize("skip", [True, False])
async def test_offsets_of_an_echoed_text(api: Harness, skip: bool) -> None:
    """They count in the text as it was given: its special tokens, without those put around it."""
    body: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 2}
    body["skip_special_tokens"] = skip
    (choice,) = (await api.complete("<|im_start|>Hi", **body)).json()["choices"]
    assert choice["text"] == "<|im_start|>HiHe"
    assert choice["logprobs"]["tokens"] == ["<s>", "<|im_start|>", "H", "i", "H", "e"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 12, 13, 14, 15]
    (choice,) = (await api.complete("éa", add_special_tokens=False, **body)).json()["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]
    # Of token ids the text is what is decoded.
    (choice,) = (await api.complete([BOS, 258, *b"Hi"], **body)).json()["choices"]
    wanted = [0, 0, 0, 1, 2, 3] if skip else [0, 3, 15, 16, 17, 18]
    assert choice["logprobs"]["text_offset"] == wanted
    assert choice["text"] == ("" if skip else "<s><|im_start|>") + "HiHe"


async def test_no_answer_but_the_echo(api: Harness) -> None:
    """max_tokens of 0: the engine computes one token, which nobody sees."""
    body = (await api.complete("Hi", echo=True, max_tokens=0, logprobs=1)).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "H", "i"]
    assert body["usage"]["completion_tokens"] == 0
    assert api.engine.requests[0].params.max_tokens == 1


async def test_logprobs(api: Harness) -> None:
    """Four lists of one length. The end token counts, as in vLLM."""
    api.engine.script = says("hé!")
    body = (await api.complete("Hi", logprobs=2)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "!", "</s>"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    assert logprobs["token_logprobs"] == [logprob_of(i) for i in (*"hé!".encode(), EOS)]
    assert logprobs["top_logprobs"][0] == {"\x01": -0.01, "\x02": -0.02, "h": logprob_of(0x68)}


async def test_logprobs_of_zero(api: Harness) -> None:
    body = (await api.complete("Hi", logprobs=0, max_tokens=1)).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"H": logprob_of(ord("H"))}]


async def test_logprobs_have_a_limit(make_api: Any) -> None:
    api = make_api(max_logprobs=3)
    assert (await api.complete(logprobs=3)).status_code == 200
    for name in ("logprobs", "prompt_logprobs"):
        assert error_of(await api.complete(**{name: 4}))["param"] == name
        assert error_of(await api.complete(**{name: -1}))["param"] == name


async def test_prompt_logprobs(api: Harness) -> None:
    """Apart from echo: vLLM's shape, and with `echo` each list keeps its own length of tops."""
    body = (await api.complete("Hi", prompt_logprobs=1, echo=True, logprobs=2)).json()
    (choice,) = body["choices"]
    assert [entry and len(entry) for entry in choice["prompt_logprobs"]] == [None, 2, 2]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3


async def test_return_token_ids(api: Harness) -> None:
    (choice,) = (await api.complete("Hi", return_token_ids=True, max_tokens=2)).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS, *b"Hi"], [*b"He"])


async def test_stream_options_need_stream(api: Harness) -> None:
    response = await api.complete(stream_options={"include_usage": True})
    assert error_of(response)["param"] == "stream_options"


class TestEvaluationHarness:
    """lm-evaluation-harness 0.4.13, `local-completions`: what it sends and how it reads."""

    @staticmethod
    def payload(prompts: list[list[int]]) -> dict[str, Any]:
        return {
            "model": "fake",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }

    @staticmethod
    def parse(body: dict[str, Any], context_lens: list[int]) -> list[tuple[float, bool]]:
        """Its `parse_logprobs`, retold."""
        results = []
        ordered = sorted(body["choices"], key=lambda choice: choice["index"])
        for choice, start in zip(ordered, context_lens, strict=True):
            own = choice["logprobs"]["token_logprobs"][start:-1]
            tops = choice["logprobs"]["top_logprobs"][start:-1]
            greedy = all(a == max(b.values()) for a, b in zip(own, tops, strict=True))
            results.append((sum(own), greedy))
        return results

    async def test_loglikelihood(self, api: Harness) -> None:
        prompts = [[BOS, 10, 20, 30], [40, 50, 60, 70, 80], [BOS, 5, 1, 1]]
        body = (await api.post(COMPLETIONS, **self.payload(prompts))).json()
        results = self.parse(body, [2, 3, 2])
        assert results[0] == (logprob_of(20) + logprob_of(30), False)
        assert results[1] == (logprob_of(70) + logprob_of(80), False)
        assert results[2] == (-0.02, True)  # token 1 is the likeliest: the same float
        for choice, prompt in zip(body["choices"], prompts, strict=True):
            lists = choice["logprobs"]
            assert {len(lists[name]) for name in lists} == {len(prompt) + 1}
            assert lists["token_logprobs"][0] is None
            assert lists["top_logprobs"][0] is None

    async def test_exactly_one_token_even_if_it_ends_the_answer(self, api: Harness) -> None:
        api.engine.script = lambda request: [[EOS]]
        body = (await api.post(COMPLETIONS, **self.payload([[BOS, 10, 20]]))).json()
        assert len(body["choices"][0]["logprobs"]["token_logprobs"]) == 4

    async def test_a_likelier_token_of_the_same_text_is_not_lost(self, api: Harness) -> None:
        """Two tokens may look alike; `max` of the tops must still be the likeliest one's."""
        from penstock.server.logprobs import completion_logprobs
        from penstock.text.stream import TokenText, TopToken

        top = (TopToken(5, "a", b"a", -0.1),)
        lists = completion_logprobs([TokenText(6, "a", b"a", 0, -3.0, 2, top)])
        assert lists.top_logprobs == [{"a": -0.1}]

    async def test_long_prompts_leave_the_event_loop(self, make_api: Any) -> None:
        api = make_api()
        prompts = [list(itertools.islice(itertools.cycle(range(256)), 400))] * 20
        body = (await api.post(COMPLETIONS, **self.payload(prompts))).json()
        assert len(body["choices"]) == 20
        assert len(body["choices"][19]["logprobs"]["tokens"]) == 401

    async def test_generate_until(self, api: Harness) -> None:
        body = (
            await api.post(
                COMPLETIONS,
                model="fake",
                prompt=[[1, 2, 3]],
                max_tokens=256,
                temperature=0,
                stop=["\n\n", "wör", "</s>"],
                seed=1234,
            )
        ).json()
        assert body["choices"][0]["text"] == "Hello, "

    async def test_remote_tokenizer(self, api: Harness) -> None:
        """Its `RemoteTokenizer` needs these three and nothing else."""
        info = (await api.http.get("/tokenizer_info")).json()
        assert info["eos_token"] == "</s>"
        assert info["bos_token"] == "<s>"
        assert info["pad_token"] is None
        assert "im_start" in info["chat_template"]

        async def encode(text: str) -> list[int]:
            answer = await api.post("/tokenize", prompt=text, add_special_tokens=False)
            tokens = answer.json()["tokens"]
            assert isinstance(tokens, list)
            return tokens

        assert (await encode(info["eos_token"]))[0] == EOS
        assert await encode("test") == [*b"test"]
        decoded = (await api.post("/detokenize", tokens=[*b"te", EOS])).json()
        assert decoded == {"prompt": "te</s>"}

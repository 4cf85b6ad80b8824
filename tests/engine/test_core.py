"""EngineCore: the edges of a request's life, what is refused, and what an engine says of itself."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_tiny import EOS, VOCAB, Oracle, TinyModel, run
from tests.models.helpers import BACKENDS

from penstock.engine import runner
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.errors import (
    ConfigError,
    ContextTooLong,
    NotEnoughMemory,
    RequestError,
)
from penstock.types import EngineRequest, FinishReason, SamplingParams

PROMPT = [(5 * i + 2) % EOS for i in range(64)]
LENGTH = FinishReason.LENGTH


def greedy(request_id: str, prompt: list[int], max_tokens: int | None = 6) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)


def naive(oracle: Oracle, request: EngineRequest, max_model_len: int = 64) -> list[int]:
    params = request.params
    return oracle.generate(
        request.prompt_token_ids, params, params.seed or 0, max_model_len
    ).token_ids


# -- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("max_tokens", [None, 1, 5])
def test_a_prompt_that_leaves_one_token(
    tiny: TinyModel, oracle: Oracle, block_size: int, max_tokens: int | None
) -> None:
    core = tiny.core(max_model_len=32, block_size=block_size)
    request = greedy("a", PROMPT[:31], max_tokens)
    output = run(core, [request])["a"]
    assert (output.token_ids, output.finish) == (naive(oracle, request, 32), LENGTH)
    assert len(output.token_ids) == 1


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_prompts_around_block_borders(
    tiny: TinyModel, oracle: Oracle, block_size: int, enable_prefix_caching: bool
) -> None:
    """One after the other, so that each finds the blocks of those before."""
    core = tiny.core(block_size=block_size, enable_prefix_caching=enable_prefix_caching)
    for num_tokens in (1, 2, 3, 15, 16, 17, 32, 33, 48, 47, 16):
        request = greedy("a", PROMPT[:num_tokens])
        assert run(core, [request])["a"].token_ids == naive(oracle, request), num_tokens
    assert (core.stats.num_prefix_hit_tokens > 0) == enable_prefix_caching


def test_equal_prompts_at_once(tiny: TinyModel, oracle: Oracle) -> None:
    core = tiny.core(block_size=3, num_blocks=200)
    requests = [greedy(str(index), PROMPT[:20]) for index in range(16)]
    outputs = run(core, requests)
    wanted = naive(oracle, requests[0])
    assert all(output.token_ids == wanted for output in outputs.values())


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_pool_of_one_request(tiny: TinyModel, oracle: Oracle, block_size: int) -> None:
    """Requests that grow to the whole pool: they take turns, and each comes out right."""
    core = tiny.core(max_model_len=30, block_size=block_size, num_blocks=-(-30 // block_size))
    requests = [greedy(str(index), PROMPT[index : index + 5], None) for index in range(4)]
    outputs = run(core, requests)
    for request in requests:
        assert outputs[request.request_id].token_ids == naive(oracle, request, 30)
    assert core.stats.num_preemptions > 0


def test_abort_between_steps_frees_at_once(tiny: TinyModel, oracle: Oracle) -> None:
    core = tiny.core(block_size=1, max_num_batched_tokens=7, enable_prefix_caching=False)
    core.add(greedy("gone", PROMPT[:20]))
    core.add(stays := greedy("stays", PROMPT[3:9]))
    core.step()  # in the middle of the prompt
    (event,) = core.abort("gone")
    assert (event.finish, event.token_ids) == (FinishReason.ABORT, [])
    core.scheduler.check()
    assert core.stats.num_used_blocks < 10
    assert core.abort("gone") == [], "aborting twice does nothing"
    assert core.abort("never came") == []
    found: list[int] = []
    while core.has_work:
        found += [token_id for event in core.step() for token_id in event.token_ids]
    assert found == naive(oracle, stays)
    core.add(greedy("gone", PROMPT[:4]))  # its id is free again


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_equal_prompts_in_chunks_that_end_inside_of_blocks(
    tiny: TinyModel, oracle: Oracle, chunk: int
) -> None:
    """A block whose last token is not computed yet must not be read by the next request."""
    core = tiny.core(block_size=4, num_blocks=200, long_prefill_token_threshold=chunk)
    requests = [greedy(str(index), PROMPT[:20]) for index in range(12)]
    arrivals = {str(index): index for index in range(12)}
    outputs = run(core, requests, arrivals=arrivals)
    wanted = naive(oracle, requests[0])
    assert all(output.token_ids == wanted for output in outputs.values())
    assert core.stats.num_chunks > 12 // chunk
    assert core.stats.num_prefix_hit_tokens > 0


def test_an_answer_is_the_same_alone_and_among_others(tiny: TinyModel) -> None:
    """33 requests in each step, all with settings of their own; then each in an engine alone."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"typical_p": 0.8},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.9, "frequency_penalty": 0.5},
        {"logit_bias": {7: 3.0, 11: -50.0}},
        {"allowed_token_ids": tuple(range(20))},
        {"banned_token_ids": tuple(range(0, 60, 2)), "logprobs": 3},
    ]
    requests = [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=PROMPT[index : index + 3 + index % 7],
            params=SamplingParams(
                **{
                    "temperature": 0.5 + index / 20,
                    "seed": index // 3,  # others have the same seed
                    "max_tokens": 10,
                    "ignore_eos": True,
                    **settings[index % len(settings)],
                }
            ),
        )
        for index in range(33)
    ]
    widths = []
    together = run(
        tiny.core(num_blocks=400),
        requests,
        on_step=lambda core: widths.append(core.stats.num_running),
    )
    assert widths[:-1] == [33] * 9
    for request in requests:
        (alone,) = run(tiny.core(), [request]).values()
        among = together[request.request_id]
        assert among.token_ids == alone.token_ids, request
        assert [item.token_id for item in among.logprobs] == [
            item.token_id for item in alone.logprobs
        ]
    assert len({tuple(output.token_ids) for output in together.values()}) > 25


def test_a_row_is_used_again(tiny: TinyModel, oracle: Oracle) -> None:
    """What one request's settings and tokens were does not colour the next in its row."""
    core = tiny.core(max_num_seqs=1)
    params = SamplingParams(
        temperature=1.5, top_k=3, seed=1, repetition_penalty=2.0, logprobs=1, prompt_logprobs=1
    )
    run(core, [EngineRequest(request_id="a", prompt_token_ids=PROMPT[:40], params=params)])
    output = run(core, [request := greedy("b", PROMPT[50:53])])["b"]
    assert output.token_ids == naive(oracle, request)
    assert (output.logprobs, output.prompt_logprobs) == ([], None)


def test_prompt_logprobs_come_in_pieces(
    tiny: TinyModel, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PROMPT_LOGPROB_ROWS", 5)
    core = tiny.core(max_num_batched_tokens=23)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    request = EngineRequest(request_id="a", prompt_token_ids=PROMPT[:40], params=params)
    found = run(core, [request])["a"].prompt_logprobs
    assert found is not None
    wanted = oracle.logprobs(PROMPT[:40])
    assert found[0] is None
    for at in range(1, 40):
        of_token = found[at]
        assert of_token is not None
        assert of_token.logprob == pytest.approx(float(wanted[at - 1, PROMPT[at]]), abs=1e-3)


def test_seeds_are_drawn_from_the_engines(tiny: TinyModel) -> None:
    def answers(seed: int) -> list[list[int]]:
        params = SamplingParams(temperature=2.0, max_tokens=12)
        requests = [
            EngineRequest(request_id=str(i), prompt_token_ids=PROMPT[:5], params=params)
            for i in range(3)
        ]
        return [output.token_ids for output in run(tiny.core(seed=seed), requests).values()]

    first = answers(0)
    assert first == answers(0), "the same engine seed, the same order: the same answers"
    assert first != answers(1)
    assert len({tuple(answer) for answer in first}) == 3, "each request has its own seed"


# -- refusals ------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt_token_ids": []}, "prompt_token_ids"),
    "float": ({"prompt_token_ids": [1, 2.5]}, "prompt_token_ids"),
    "text": ({"prompt_token_ids": ["a"]}, "prompt_token_ids"),
    "ragged": ({"prompt_token_ids": [1, [2]]}, "prompt_token_ids"),
    "nested": ({"prompt_token_ids": [[1, 2]]}, "prompt_token_ids"),
    "negative id": ({"prompt_token_ids": [1, -1]}, "prompt_token_ids"),
    "large id": ({"prompt_token_ids": [VOCAB]}, "prompt_token_ids"),
    "huge id": ({"prompt_token_ids": [2**70]}, "prompt_token_ids"),
    "too long": ({"prompt_token_ids": [1] * 64}, "prompt_token_ids"),
    "used id": ({"request_id": "good"}, "request_id"),
    "unhashable id": ({"request_id": ["bad"]}, "request_id"),
    "priority": ({"priority": "x"}, "priority"),
    "no priority": ({"priority": None}, "priority"),
    "huge priority": ({"priority": 2**70}, "priority"),
    "salt": ({"salt": 0}, "salt"),  # which would be a node of the prefix cache
    "n": ({"params": SamplingParams(n=2)}, "n"),
    "bias": ({"params": SamplingParams(logit_bias={VOCAB: 1.0})}, "logit_bias"),
    "allowed": ({"params": SamplingParams(allowed_token_ids=(VOCAB,))}, "allowed_token_ids"),
    "banned": ({"params": SamplingParams(banned_token_ids=(VOCAB,))}, "banned_token_ids"),
    "stop": ({"params": SamplingParams(stop_token_ids=(VOCAB,))}, "stop_token_ids"),
    "logprobs": ({"params": SamplingParams(logprobs=VOCAB + 1)}, "logprobs"),
    "prompt_logprobs": ({"params": SamplingParams(prompt_logprobs=62)}, "prompt_logprobs"),
    "nothing allowed": (
        {"params": SamplingParams(allowed_token_ids=(1, 2), banned_token_ids=(2, 1))},
        "allowed_token_ids",
    ),
    "all banned": (
        {"params": SamplingParams(banned_token_ids=tuple(range(VOCAB)))},
        "banned_token_ids",
    ),
    "only the end": (
        {"params": SamplingParams(allowed_token_ids=(EOS,), min_tokens=2)},
        "allowed_token_ids",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_request_is_refused_and_others_go_on(
    tiny: TinyModel, oracle: Oracle, bad: str
) -> None:
    changes, field = BAD[bad]
    core = tiny.core(scheduling_policy="priority")
    core.add(good := greedy("good", PROMPT[:9]))
    core.step()
    stats, seeds = replace(core.stats), core._seeds.getstate()
    fields = {"request_id": "bad", "prompt_token_ids": [1, 2], "params": SamplingParams()}
    with pytest.raises(RequestError) as error:
        core.add(EngineRequest(**{**fields, **changes}))
    assert error.value.field == field
    assert f"`{field}`" in error.value.message or isinstance(error.value, ContextTooLong)
    assert (core.stats, core._seeds.getstate()) == (stats, seeds), "nothing has changed"
    assert core.abort("bad") == []
    core.scheduler.check()
    tokens = naive(oracle, good)[:1]
    while core.has_work:
        tokens += [token_id for event in core.step() for token_id in event.token_ids]
    assert tokens == naive(oracle, good)


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "top_k", "seed", "stop_token_ids"])
def test_numbers_beyond_all_arrays_are_refused(name: str) -> None:
    fields: dict[str, Any] = {"max_tokens": None, name: (2**70,) if "ids" in name else 2**70}
    with pytest.raises(RequestError):
        SamplingParams(**fields)


def test_repeated_ids_cost_nothing(tiny: TinyModel) -> None:
    """However long a list is that comes in, a step never sees more ids than the vocabulary has."""
    core = tiny.core()
    ids = (7, 3, 5)
    params = SamplingParams(
        temperature=0.0,
        allowed_token_ids=ids * 1000,
        banned_token_ids=(9, 9),
        stop_token_ids=ids[:1] * 1000,
        logit_bias={5: 1.0},
    )
    core.add(EngineRequest(request_id="a", prompt_token_ids=[1], params=params))
    request = core.scheduler._requests["a"]
    assert request.params.allowed_token_ids == ids
    assert request.params.banned_token_ids == (9,)
    assert request.params.stop_token_ids == (7,)
    assert request.stop_token_ids == {7}
    assert request.params == replace(
        params, allowed_token_ids=ids, banned_token_ids=(9,), stop_token_ids=(7,)
    )


def test_extreme_parameters_do_not_stop_a_step(tiny: TinyModel) -> None:
    """All that `add` takes can be computed."""
    extremes: list[dict[str, Any]] = [
        {"temperature": 100.0},
        {"temperature": 2e-5},
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"typical_p": 1e-9},
        {"repetition_penalty": 1e-9},
        {"repetition_penalty": 10.0, "presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"logit_bias": dict.fromkeys(range(VOCAB), -100.0)},
        {"allowed_token_ids": (3,), "logit_bias": {3: -100.0}},
        {"banned_token_ids": tuple(range(1, VOCAB))},
        {"logprobs": VOCAB, "prompt_logprobs": VOCAB},
        {"min_tokens": 4, "stop_token_ids": tuple(range(50))},
        {"min_tokens": 5, "max_tokens": None, "allowed_token_ids": (EOS, 2), "ignore_eos": False},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
    ]
    requests = [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=PROMPT[:7],
            params=SamplingParams(**{"max_tokens": 5, "ignore_eos": True, **extreme}),
        )
        for index, extreme in enumerate(extremes)
    ]
    for output in run(tiny.core(max_model_len=12), requests).values():
        assert len(output.token_ids) == 5
        assert all(0 <= token_id < VOCAB for token_id in output.token_ids)


# -- start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_config_is_the_whole_engine(backend: str, checkpoint: Path, oracle: Oracle) -> None:
    config = EngineConfig(model=str(checkpoint), max_num_seqs=4, backend=backend)
    core = EngineCore.from_config(config)
    assert set(core.info.startup_s) == {"import", "plan", "load", "kv", "warmup"}
    assert all(seconds >= 0 for seconds in core.info.startup_s.values())
    assert (core.info.vocab_size, core.info.max_model_len) == (VOCAB, 64)
    assert (core.info.eos_token_ids, core.info.dtype) == ((EOS,), "float32")
    assert core.info.num_blocks == 16, "four requests of 64 tokens"
    assert core.info.plan[0].startswith(f"backend    {backend}")
    assert any("KV cache" in line for line in core.info.plan)
    assert (core.stats.num_steps, core.stats.num_blocks) == (0, 16), "warming up is not counted"
    requests = [greedy(str(index), PROMPT[index : index + 10]) for index in range(3)]
    outputs = run(core, requests)
    assert [outputs[r.request_id].token_ids for r in requests] == [
        naive(oracle, request) for request in requests
    ]
    assert core.stats.last_step_s > 0


def test_a_step_smaller_than_the_warm_up(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), max_num_batched_tokens=1, max_num_seqs=1)
    output = run(EngineCore.from_config(config), [greedy("a", [1, 2, 3])])["a"]
    assert len(output.token_ids) == 6


def test_a_context_shorter_than_the_warm_up(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), max_model_len=2, block_size=1, num_blocks=2)
    output = run(EngineCore.from_config(config), [greedy("a", [1])])["a"]
    assert len(output.token_ids) == 1


def test_dummy_weights(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), load_format="dummy", dtype="bfloat16")
    core = EngineCore.from_config(config)
    assert core.info.dtype == "bfloat16"
    assert len(run(core, [greedy("a", PROMPT[:5])])["a"].token_ids) == 6


def test_too_little_memory_fails_before_loading(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    started_s = time.monotonic()
    config = EngineConfig(model=str(tmp_path), num_blocks=10**12)
    with pytest.raises(NotEnoughMemory, match="blocks"):  # not: there are no weights
        EngineCore.from_config(config)
    assert time.monotonic() - started_s < 60


def test_an_unknown_model_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no-such-model"):
        EngineCore.from_config(EngineConfig(model="no-such-model"))


@pytest.mark.parametrize(("num_threads", "expected"), [(None, 1), (2, 2)])
def test_a_small_model_runs_on_one_thread_unless_told(
    checkpoint: Path, num_threads: int | None, expected: int
) -> None:
    """Threads that wait for one another cost a small model more than they give."""
    before = torch.get_num_threads()
    try:
        config = EngineConfig(model=str(checkpoint), num_threads=num_threads, backend="torch")
        EngineCore.from_config(config)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)

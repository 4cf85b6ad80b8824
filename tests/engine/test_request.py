"""`Request`: what a sampled token does to it, and how prompt log-probabilities are kept."""

from __future__ import annotations

import pytest

from penstock.engine.request import Request
from penstock.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs, Usage

EOS = frozenset({2, 3})


def make_request(params: SamplingParams, num_prompt: int = 3) -> Request:
    asked = EngineRequest(
        request_id="r", prompt_token_ids=list(range(10, 10 + num_prompt)), params=params
    )
    return Request(asked, seed=0, arrival=0, arrival_s=0.0)


def run(params: SamplingParams, token_ids: list[int], max_model_len: int = 100) -> list[object]:
    """The finish reason behind each token."""
    request = make_request(params)
    finishes: list[object] = []
    for token_id in token_ids:
        finishes.append(request.finish_with(token_id, EOS, max_model_len))
        request.token_ids.append(token_id)
    return finishes


def test_a_new_request_has_everything_to_do() -> None:
    request = make_request(SamplingParams())
    assert (request.num_tokens, request.num_pending, request.num_generated) == (3, 3, 0)
    assert (request.num_computed, request.row, request.blocks) == (0, None, [])
    assert request.usage == Usage(3, 0, 0, 0.0)


def test_the_prompt_is_copied() -> None:
    prompt = [5, 6]
    asked = EngineRequest(request_id="r", prompt_token_ids=prompt, params=SamplingParams())
    Request(asked, seed=0, arrival=0, arrival_s=0.0).token_ids.append(7)
    assert prompt == [5, 6]


def test_drafts_are_pending_but_no_tokens_yet() -> None:
    request = make_request(SamplingParams())
    request.num_computed = 2
    request.draft = [7, 8]
    assert (request.num_tokens, request.num_pending) == (3, 3)


@pytest.mark.parametrize("eos_id", sorted(EOS))
def test_any_end_token_stops(eos_id: int) -> None:
    assert run(SamplingParams(), [7, eos_id]) == [None, FinishReason.STOP]


def test_ignore_eos_does_not_ignore_stop_tokens() -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=(9,))
    assert run(params, [2, 3, 9]) == [None, None, FinishReason.STOP]


def test_a_stop_token_that_is_an_end_token_stops_even_if_ends_are_ignored() -> None:
    assert run(SamplingParams(ignore_eos=True, stop_token_ids=(2,)), [2]) == [FinishReason.STOP]


@pytest.mark.parametrize("token_id", [2, 9])
def test_min_tokens_holds_back_the_end(token_id: int) -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(9,))
    assert run(params, [token_id] * 3) == [None, None, FinishReason.STOP]


def test_max_tokens() -> None:
    assert run(SamplingParams(max_tokens=2), [7, 7]) == [None, FinishReason.LENGTH]


def test_min_tokens_equal_to_max_tokens_ends_by_length() -> None:
    assert run(SamplingParams(min_tokens=1, max_tokens=1), [2]) == [FinishReason.LENGTH]


def test_the_context_ends_a_request_without_max_tokens() -> None:
    params = SamplingParams(max_tokens=None)
    assert run(params, [7, 7], max_model_len=5) == [None, FinishReason.LENGTH]


def test_an_end_token_at_the_limit_is_an_end() -> None:
    assert run(SamplingParams(max_tokens=1), [2]) == [FinishReason.STOP]
    assert run(SamplingParams(max_tokens=None), [2], max_model_len=4) == [FinishReason.STOP]


def test_prompt_logprobs_are_kept_once_whatever_the_chunks() -> None:
    """Chunks [0, 2), [2, 3), a preemption, chunks [0, 4), [4, 6) of a prompt of six tokens."""
    whole = [TokenLogprobs(position, -float(position), 1) for position in range(6)]
    request = make_request(SamplingParams(prompt_logprobs=0), num_prompt=6)
    for start, end in [(0, 2), (2, 3), (0, 4), (4, 6)]:
        request.collect_prompt_logprobs(start, whole[start + 1 : end + 1])
        assert request.prompt_logprobs is not None
        assert request.prompt_logprobs[0] is None
        assert request.prompt_logprobs[1:] == whole[1 : len(request.prompt_logprobs)]
    assert request.prompt_logprobs == [None, *whole[1:]]


def test_prompt_logprobs_are_not_kept_if_not_asked_for() -> None:
    request = make_request(SamplingParams())
    request.collect_prompt_logprobs(0, ())
    assert request.prompt_logprobs is None

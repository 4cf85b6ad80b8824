"""SamplingParams: every field is checked, and each answer of `n` gets a seed of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from penstock.errors import InvalidField
from penstock.types import MAX_INT, MAX_SEED, SamplingParams

WRONG: dict[str, list[Any]] = {
    "n": [0, 129, 1.0, True, "1", None],
    "max_tokens": [0, -1, 2**70, 1.5, "x", True],
    "min_tokens": [-1, 17, 2**70, None],
    "temperature": [-0.1, 101, float("nan"), float("inf"), "1", True, None],
    "top_k": [-1, 2**31, 0.5, True],
    "top_p": [0, 1.01, -1, "x", None],
    "min_p": [-0.1, 1.1],
    "typical_p": [0, 2],
    "repetition_penalty": [0, -1, 11],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logit_bias": [[1], "x", {1: True}, {1: 101}, {-1: 0}, {"1": 0}, {1: None}, {2**40: 1}],
    "allowed_token_ids": [(), 5, "ab", (True,), (-1,), (1.0,), (2**31,), {1: 2}],
    "banned_token_ids": [None, 5, "ab", ("1",)],
    "stop_token_ids": [None, 5, (-1,)],
    "ignore_eos": [1, "no", None],
    "seed": [2**63, -(2**63) - 1, 1.0, True, "x"],
    "logprobs": [-1, 1001, True],
    "prompt_logprobs": [-1, 1001],
    "stop": [("",), 5, (5,), None, ("a", None), ""],
    "include_stop_str_in_output": [1, None],
    "skip_special_tokens": [0, None],
}


def test_every_field_has_wrong_values() -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), [(n, value) for n in WRONG for value in WRONG[n]])
def test_wrong_values_name_the_field(name: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.field == name
    assert f"`{name}`" in caught.value.message


def test_lists_and_a_single_stop_string_will_do() -> None:
    params = SamplingParams(
        stop="time",  # type: ignore[arg-type]
        stop_token_ids=[1, 2],  # type: ignore[arg-type]
        allowed_token_ids=[3],  # type: ignore[arg-type]
        top_k=MAX_INT,
    )
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (
        ("time",),
        (1, 2),
        (3,),
    )


@pytest.mark.parametrize("seed", [0, -1, 7, MAX_SEED, -MAX_SEED - 1])
def test_answer_0_of_n_is_the_answer_of_one(seed: int) -> None:
    params = SamplingParams(n=4, seed=seed, temperature=0.5, stop=("x",))
    samples = [params.for_sample(index) for index in range(4)]
    assert samples[0] == SamplingParams(seed=seed, temperature=0.5, stop=("x",))
    assert len({sample.seed for sample in samples}) == 4
    for sample in samples:
        assert dataclasses.replace(sample) == sample  # still valid


def test_only_answer_0_tells_of_the_prompt() -> None:
    params = SamplingParams(n=2, prompt_logprobs=1)
    assert [params.for_sample(index).prompt_logprobs for index in (0, 1)] == [1, None]


def test_without_a_seed_the_engine_draws_one() -> None:
    assert SamplingParams(n=2).for_sample(1).seed is None
    single = SamplingParams()
    assert single.for_sample(0) is single

"""Divergence of distributions: against scipy, and of brook in two precisions."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from scipy import special, stats
from tests.measure.verdict.helpers_simulated import window_mark

from penstock.errors import ConfigError
from penstock.measure.engines.arms import parse_arm
from penstock.measure.load.target import Ask
from penstock.measure.quality.tasks import Item
from penstock.measure.records import Request
from penstock.measure.verdict import divergence, divergence_run

TEXTS = [
    {"prompt": None, "messages": [{"role": "user", "content": "What is 12 + 13?"}], "answer": "25"},
    {"prompt": "The cat is", "messages": None, "answer": " on the mat and it sleeps there."},
]


def test_window_facts_are_scipys() -> None:
    rng = np.random.default_rng(0)
    base, variant = rng.normal(0, 3, (2, 7, 50)).astype(np.float32)
    targets = rng.integers(50, size=7)
    found = divergence.window_facts(base, variant, targets)
    p, q = special.softmax(base, axis=1), special.softmax(variant, axis=1)
    assert found["kl"] == pytest.approx(
        [stats.entropy(a, b) for a, b in zip(p, q, strict=True)], rel=1e-4
    )
    assert found["nll_a"] == pytest.approx(-np.log(p[range(7), targets]), rel=1e-4)
    assert found["nll_b"] == pytest.approx(-np.log(q[range(7), targets]), rel=1e-4)
    assert found["top1"] == (p.argmax(1) == q.argmax(1)).astype(int).tolist()


def test_figures_are_of_all_tokens_with_windows_as_units() -> None:
    windows = [
        {"kl": [0.1, 0.3], "nll_a": [1.0, 2.0], "nll_b": [1.5, 2.5], "top1": [1, 0]},
        {"kl": [0.2], "nll_a": [0.5], "nll_b": [0.5], "top1": [1]},
    ]
    found = divergence.figures([window_mark(**window) for window in windows])
    assert found is not None
    assert (found["num_windows"], found["num_tokens"]) == (2, 3)
    assert found["mean_kl"].estimate == pytest.approx(0.2)
    assert found["mean_kl"].num_units == 2
    assert found["top1"].estimate == pytest.approx(2 / 3)
    assert found["ln_ppl_ratio"].estimate == pytest.approx(1 / 3)
    assert found["ppl_b"] / found["ppl_a"] == pytest.approx(math.exp(1 / 3))
    assert found["kl_quantiles"]["max"] == pytest.approx(0.3)
    assert divergence.figures([]) is None


def test_one_window_has_no_interval() -> None:
    """Its tokens depend on one another: how far another text is from it, nobody knows."""
    facts = {"kl": [0.1, 0.3], "nll_a": [1.0, 2.0], "nll_b": [1.5, 2.5], "top1": [1, 0]}
    found = divergence.figures([window_mark(**facts)])
    assert found is not None
    assert found["mean_kl"].estimate == pytest.approx(0.2)
    assert (found["mean_kl"].low, found["mean_kl"].high) == (-math.inf, math.inf)


def test_a_window_is_computed_in_parts_that_change_nothing() -> None:
    import tracemalloc

    rng = np.random.default_rng(1)
    base, variant = rng.normal(0, 3, (2, 300, 4_000)).astype(np.float32)
    targets = rng.integers(4_000, size=300)
    tracemalloc.start()
    whole = divergence.window_facts(base, variant, targets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * base.nbytes
    for part in (slice(0, 90), slice(90, 300)):
        some = divergence.window_facts(base[part], variant[part], targets[part])
        assert some == {name: values[part] for name, values in whole.items()}


def windows(base: str, variant: str, num_tokens: int = 1_000) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        specs = (parse_arm(base), parse_arm(variant))
        made = divergence_run.divergence_windows(specs, TEXTS, num_tokens)
        return [facts async for facts in made]

    return asyncio.run(collect())


def test_brook_against_itself_and_in_int8() -> None:
    """The logits are those that `prompt_logprobs` tells, and quantisation moves them a little."""
    from penstock import LLM, SamplingParams

    same = windows("brook", "inprocess:brook")
    assert [max(facts["kl"]) for facts in same] == [0, 0]
    assert all(min(facts["top1"]) == 1 for facts in same)
    less = windows("brook", "brook?quantization=int8")
    assert all(0 < max(facts["kl"]) < 1 for facts in less)
    assert [facts["nll_a"] for facts in less] == [facts["nll_a"] for facts in same]

    llm = LLM("brook")
    prompt = llm.tokenizer.encode(TEXTS[1]["prompt"])
    answer = llm.tokenizer.encode(TEXTS[1]["answer"], add_special_tokens=False)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    (output,) = llm.generate([prompt + answer], params, progress=False)
    assert output.prompt_logprobs is not None
    expected = [-one.logprob for one in output.prompt_logprobs[len(prompt) :] if one is not None]
    assert same[1]["nll_a"] == pytest.approx(expected, abs=1e-3)


def test_num_tokens_bounds_it() -> None:
    assert len(windows("brook", "brook", num_tokens=1)) == 1


def test_only_two_precisions_of_one_model_on_our_engine() -> None:
    assert windows("brook", "brook-draft") == []
    assert windows("brook", "http://127.0.0.1:1") == []
    assert windows("brook", "llama-server:brook") == []


def test_a_wrong_option_is_told() -> None:
    with pytest.raises(ConfigError, match="The engine has no option `nonsense`"):
        windows("brook", "brook?nonsense=1")


def test_conversations_are_the_items_and_the_answers_of_the_base() -> None:
    items = {"t": [Item(id=name, ask=Ask(prompt_id=name, prompt=f"ask {name}")) for name in "ab"]}
    rows = [
        Request(
            stage=stage,
            task="t",
            prompt_id=name,
            details={"role": role},
            output=f"{role}{name}",
            t_done_ns=1,
        )
        for stage, name, role in (("quality", "a", 1), ("quality", "a", 0), ("repeat", "b", 0))
    ]
    assert divergence_run.conversations(rows, items) == [
        {"prompt": "ask a", "messages": None, "answer": "0a"}
    ]

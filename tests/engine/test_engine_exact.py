"""The engine answers what a naive uncached loop answers, whatever it does inside.

A near tie in the naive logits (see `helpers_tiny`) is the only excuse, and must stay rare.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from helpers_tiny import EOS, VOCAB, Oracle, Output, TinyModel, run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.engine.core import EngineCore
from penstock.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs

MAX_MODEL_LEN = 32
# Prompts begin like one of these, so that prefixes are shared; a third one has its own.
BASES = [[(7 * i + 3) % EOS for i in range(24)], [(11 * i * i + 5) % EOS for i in range(24)]]

EVENTS = (
    "preemptions",
    "hits",
    "chunks",
    "aborts",
    "cuts",  # steps that were interrupted
    "wide_steps",  # three requests or more at once
    "sampled",
    "logprobs",
    "prompt_logprobs",
)


class Scenario(NamedTuple):
    settings: dict[str, Any]
    requests: list[EngineRequest]
    arrivals: dict[str, int]
    aborts: dict[str, int]
    cuts: list[int]


tokens = st.integers(0, VOCAB - 1)
odd_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.4, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([0.6, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "typical_p": st.sampled_from([0.7, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.9]),
        "frequency_penalty": st.sampled_from([0.0, -0.7]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-50.0, -2.0, 3.0]), max_size=3),
        "banned_token_ids": st.lists(tokens, max_size=5).map(tuple),
        "allowed_token_ids": st.lists(tokens, min_size=20, max_size=30, unique=True).map(tuple),
        "stop_token_ids": st.lists(tokens, max_size=6).map(tuple),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 0, 3]),
        "prompt_logprobs": st.sampled_from([None, 0, 2]),
    },
)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    drawn: dict[str, Any] = draw(odd_params) if draw(st.booleans()) else {}
    temperature = draw(st.sampled_from([0.0, 0.0, 0.8]))
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 16)))
    min_tokens = draw(st.sampled_from([0, 0, 2])) if max_tokens is None or max_tokens >= 2 else 0
    return SamplingParams(
        **{"temperature": temperature, **drawn},
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=draw(st.integers(-5, 5)),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    base: list[int] = draw(st.sampled_from(BASES))
    shared = base[: draw(st.sampled_from([2, 0, 5, 6, 16, 24]))]
    tail = draw(st.lists(tokens, min_size=0 if shared else 1, max_size=7))
    return shared + tail


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    block_size = draw(st.sampled_from([1, 3, 16]))
    one_request = -(-MAX_MODEL_LEN // block_size)
    chosen = {
        "max_model_len": MAX_MODEL_LEN,
        "block_size": block_size,
        # From the smallest pool that can finish a request to one that rarely preempts.
        "num_blocks": one_request * draw(st.sampled_from([10, 11, 15, 30])) // 10,
        "max_num_seqs": draw(st.sampled_from([8, 3, 1])),
        "max_num_batched_tokens": draw(st.sampled_from([2048, 7, 1])),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 5])),
        "enable_prefix_caching": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
    }
    requests, arrivals, aborts = [], {}, {}
    for index in range(draw(st.integers(3, 7))):
        request = EngineRequest(
            request_id=str(index),
            prompt_token_ids=draw(prompts()),
            params=draw(params()),
            priority=draw(st.integers(-1, 1)),
            salt=draw(st.sampled_from(["", "", "tenant"])),
        )
        requests.append(request)
        arrivals[request.request_id] = draw(st.sampled_from([0, 0, 1, 3, 9]))
        if draw(st.integers(0, 4)) == 4:
            aborts[request.request_id] = draw(st.integers(0, 30))
    cuts = draw(st.just([]) | st.lists(st.integers(0, 60), max_size=3))
    return Scenario(chosen, requests, arrivals, aborts, cuts)


def stress(block_size: int, num_blocks: int) -> Scenario:
    """Every event, for certain: random scenarios alone leave one out now and then."""
    odd = SamplingParams(temperature=0.8, seed=3, max_tokens=12, logprobs=2, prompt_logprobs=1)
    plain = SamplingParams(temperature=0.0, seed=0, max_tokens=14, ignore_eos=True)
    chosen = {
        "max_model_len": MAX_MODEL_LEN,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 7,
        "enable_prefix_caching": True,
    }
    requests = [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=BASES[0][:16],
            params=odd if index == 1 else plain,
        )
        for index in range(6)
    ]
    return Scenario(chosen, requests, {"4": 3, "5": 9}, {"2": 8}, [4, 17])


def test_tokens_equal_the_naive_loop(tiny: TinyModel, oracle: Oracle) -> None:
    totals = play(tiny, oracle, max_examples=60)
    for event in EVENTS:  # the stress did happen
        assert totals[event] > 0, event


def play(tiny: TinyModel, oracle: Oracle, max_examples: int) -> Counter[str]:
    """Compare an engine with the naive loop in random scenarios; what happened in them."""
    totals: Counter[str] = Counter()

    def on_step(core: EngineCore) -> None:
        totals["wide_steps"] += core.stats.num_running > 2
        totals["in_flight"] += len(core._in_flight)

    @settings(max_examples=max_examples, suppress_health_check=[HealthCheck.too_slow])
    @given(scenarios())
    @example(stress(block_size=1, num_blocks=MAX_MODEL_LEN * 2))
    @example(stress(block_size=3, num_blocks=16))
    def check(scenario: Scenario) -> None:
        core = tiny.core(**scenario.settings)
        outputs = run(
            core,
            scenario.requests,
            arrivals=scenario.arrivals,
            aborts=scenario.aborts,
            cuts=scenario.cuts,
            on_step=on_step,
            on_cut=lambda: totals.update(cuts=1),
        )
        for request in scenario.requests:
            compare(oracle, request, outputs[request.request_id], totals)
        totals["preemptions"] += core.stats.num_preemptions
        totals["hits"] += core.stats.num_prefix_hit_tokens
        totals["chunks"] += core.stats.num_chunks
        totals["steps"] += core.stats.num_steps

    check()
    print(dict(totals))
    assert totals["forgiven"] < totals["tokens"] / 1000
    return totals


def compare(oracle: Oracle, request: EngineRequest, output: Output, totals: Counter[str]) -> None:
    """Fail unless `output` is the naive answer, or a beginning of it if it was aborted."""
    request_params, prompt = request.params, request.prompt_token_ids
    num_tokens = len(output.token_ids)
    is_aborted = output.finish is FinishReason.ABORT
    assert request_params.seed is not None
    wanted = oracle.generate(
        prompt,
        request_params,
        request_params.seed,
        MAX_MODEL_LEN,
        engine=output.token_ids,
        max_tokens=max(num_tokens, 1) if is_aborted else None,
    )
    if is_aborted:
        totals["aborts"] += 1
        assert output.token_ids == wanted.token_ids[:num_tokens], request
    else:
        assert (output.token_ids, output.finish) == (wanted.token_ids, wanted.finish), request
    totals["tokens"] += num_tokens
    totals["forgiven"] += wanted.num_forgiven
    totals["sampled"] += 0 if request_params.greedy else num_tokens
    assert output.usage is not None
    assert output.usage[:1] + output.usage[2:3] == (len(prompt), num_tokens)
    compare_logprobs(oracle, request, output, totals)


def compare_logprobs(
    oracle: Oracle, request: EngineRequest, output: Output, totals: Counter[str]
) -> None:
    """Log-probabilities are those of the naive model, of prompt and answer."""
    prompt = request.prompt_token_ids
    distributions = oracle.logprobs(prompt + output.token_ids).tolist()
    k = request.params.logprobs
    assert len(output.logprobs) == (0 if k is None else len(output.token_ids))
    for at, found in enumerate(output.logprobs):
        assert k is not None
        close(found, output.token_ids[at], distributions[len(prompt) + at - 1], k)
        totals["logprobs"] += 1
    k = request.params.prompt_logprobs
    if k is None or not output.token_ids:
        assert output.prompt_logprobs is None
        return
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for at in range(1, len(prompt)):
        of_token = output.prompt_logprobs[at]
        assert of_token is not None
        close(of_token, prompt[at], distributions[at - 1], k)
        totals["prompt_logprobs"] += 1


def close(found: TokenLogprobs, token_id: int, logprobs: list[float], k: int) -> None:
    tolerance = 1e-3
    assert found.token_id == token_id
    assert abs(found.logprob - logprobs[token_id]) < tolerance
    above = sum(value > logprobs[token_id] + tolerance for value in logprobs)
    near = sum(value >= logprobs[token_id] - tolerance for value in logprobs)
    assert above < found.rank <= near
    assert len(found.top) == k
    best = sorted(logprobs, reverse=True)[:k]
    for (top_id, value), wanted in zip(found.top, best, strict=True):
        assert abs(value - wanted) < tolerance
        assert abs(value - logprobs[top_id]) < tolerance


def test_the_oracle_would_notice(oracle: Oracle) -> None:
    """Every earlier token changes the logits by far more than is forgiven."""
    prompt = BASES[0]
    last = oracle.model.logits(prompt)[-1]
    assert float(last.std()) > 2
    for at in range(len(prompt) - 1):
        changed = [*prompt]
        changed[at] = (changed[at] + 1) % VOCAB
        assert float((oracle.model.logits(changed)[-1] - last).abs().max()) > 0.05, at


def test_answers_vary(oracle: Oracle) -> None:
    """Greedy answers do not fall into a fixed token, which any bug could also produce."""
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    answers = [oracle.generate(base[:n], greedy, 0, 64) for base in BASES for n in (3, 9, 20)]
    assert all(len(set(answer.token_ids)) > 3 for answer in answers)

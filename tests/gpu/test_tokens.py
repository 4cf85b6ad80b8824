"""Tokens on the GPU: those of the CPU, whatever is captured in graphs and however far ahead it is.

That each graph is its eager step to the last bit is shown in tests/models/test_graphs.py; here are
whole requests through the engine. In float32, with brook: products of other shapes add up in
another order, which changes the last bits of a logit and no token of these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.types import EngineRequest, SamplingParams

pytestmark = pytest.mark.gpu

MAX_NUM_SEQS = 40
OUTPUT_LEN = 24


@contextmanager
def engine(**settings: Any) -> Iterator[EngineCore]:
    given: dict[str, Any] = {
        "model": "brook",
        "backend": "triton",
        "dtype": "float32",
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 256,
        "num_blocks": 1024,
    }
    yield EngineCore.from_config(EngineConfig(**(given | settings)))


def requests(num: int, seed: int) -> list[EngineRequest]:
    """Prompts of random lengths; every other one is sampled, with a seed of its own."""
    rng = random.Random(seed)
    found = []
    for index in range(num):
        params = SamplingParams(
            temperature=0.0 if index % 2 else 0.9,
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            repetition_penalty=rng.choice([1.0, 1.1]),
            seed=index,
            max_tokens=rng.randint(1, OUTPUT_LEN),
            ignore_eos=True,
        )
        prompt = rng.choices(range(16, 2000), k=rng.randint(1, 120))
        found.append(
            EngineRequest(request_id=f"{seed}-{index}", prompt_token_ids=prompt, params=params)
        )
    return found


def answers(core: EngineCore, asked: list[EngineRequest]) -> dict[str, list[int]]:
    for request in asked:
        core.add(request)
    found: dict[str, list[int]] = {request.request_id: [] for request in asked}
    while core.has_work:
        for event in core.step():
            found[event.request_id] += event.token_ids
    return found


@pytest.fixture(scope="module")
def asked() -> list[EngineRequest]:
    return requests(3 * MAX_NUM_SEQS, seed=0)


@pytest.fixture(scope="module")
def expected(asked: list[EngineRequest]) -> dict[str, list[int]]:
    """What the torch backend answers, on the CPU."""
    with engine(backend="torch") as core:
        return answers(core, asked)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"async_scheduling": False},
        {"enforce_eager": True},
        {"enforce_eager": True, "async_scheduling": False},
        {"num_blocks": 96},  # requests are preempted
        {"block_size": 1, "num_blocks": 8192},
        {"block_size": 256, "num_blocks": 128, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_cpu(
    settings: dict[str, Any], asked: list[EngineRequest], expected: dict[str, list[int]]
) -> None:
    with engine(**settings) as core:
        assert answers(core, asked) == expected

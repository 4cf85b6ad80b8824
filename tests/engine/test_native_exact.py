"""On the native backend an answer is the same to the last bit, whatever the engine does inside.

In every number format: the kernels promise that a row does not hang on its batch. In float32
`test_engine_exact` compares with a naive model; here an engine is compared with itself.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers_tiny import VOCAB, TinyModel, run

from penstock.native import library
from penstock.quantization.schemes import NATIVE_NAMES
from penstock.types import EngineRequest, SamplingParams

pytestmark = [
    pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native library here"),
    pytest.mark.usefixtures("batch_invariant_isa"),
]

FORMATS = [
    ("float32", "none", "float32"),
    *(("bfloat16", name, "bfloat16") for name in NATIVE_NAMES),
    ("bfloat16", "int4", "int8"),
    ("float32", "int8", "int8"),
]
# A pool that makes requests preempt one another, small steps, chunks, many rows.
ENGINES: list[dict[str, Any]] = [
    {"block_size": 1, "num_blocks": 90, "max_num_batched_tokens": 7},
    {"block_size": 3, "num_blocks": 30, "long_prefill_token_threshold": 5},
    {"block_size": 16, "num_blocks": 8, "enable_prefix_caching": False},
    {"block_size": 16, "max_num_seqs": 2},
    {"block_size": 1, "scheduling_policy": "priority"},
]


def requests() -> list[EngineRequest]:
    """Prompts that share beginnings; greedy ones and drawn ones, all with log-probabilities."""
    random = Random(0)
    base = [random.randrange(VOCAB - 1) for _ in range(40)]
    return [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=base[: random.choice([0, 3, 17, 33])]
            + [random.randrange(VOCAB - 1) for _ in range(random.randint(1, 8))],
            params=SamplingParams(
                temperature=random.choice([0.0, 0.0, 0.9]),
                top_p=random.choice([1.0, 0.8]),
                max_tokens=random.randint(4, 20),
                ignore_eos=True,
                logprobs=2,
                prompt_logprobs=random.choice([None, None, 1]),
                seed=index,
            ),
            priority=random.randint(0, 2),
        )
        for index in range(12)
    ]


@pytest.mark.parametrize(("dtype", "quantization", "kv_cache_dtype"), FORMATS)
def test_answers_do_not_hang_on_the_engine(
    checkpoint: Path, dtype: str, quantization: str, kv_cache_dtype: str
) -> None:
    options = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    tiny = TinyModel(checkpoint, backend="native", **options)
    alone = {}
    for request in requests():
        core = tiny.core(block_size=16, enable_prefix_caching=False)
        alone |= run(core, [request])
    two_threads = TinyModel(checkpoint, backend="native", **options | {"num_threads": 2})
    num_preemptions = num_hits = 0
    for index, settings in enumerate(ENGINES):
        model = two_threads if index % 2 else tiny
        core = model.core(max_model_len=64, **settings)
        arrivals = {request.request_id: int(request.request_id) // 3 for request in requests()}
        together = run(core, requests(), arrivals=arrivals)
        for name, output in together.items():
            assert output.token_ids == alone[name].token_ids, (settings, name)
            assert output.logprobs == alone[name].logprobs, (settings, name)
            assert output.prompt_logprobs == alone[name].prompt_logprobs, (settings, name)
        num_preemptions += core.stats.num_preemptions
        num_hits += core.stats.num_prefix_hit_tokens
    assert num_preemptions
    assert num_hits

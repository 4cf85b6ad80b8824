"""Two and four ranks answer what the naive loop answers: a model shared out is the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_tiny import EOS, VOCAB, Oracle, run

from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.engine.plan import StepPlan
from penstock.engine.ranks import RankedRunner, make_ranked_runner
from penstock.types import EngineInfo, EngineRequest, SamplingParams

pytestmark = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 4, reason="every rank needs a GPU of its own"
)

MAX_MODEL_LEN = 32
NUM_BLOCKS = 16  # of 3 tokens: requests are preempted
MAX_NUM_SEQS = 4


def settings(checkpoint: Path, size: int) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint),
        backend="triton",
        dtype="float32",
        kv_cache_dtype="float32",
        attention_backend="triton",
        async_scheduling=True,
        max_model_len=MAX_MODEL_LEN,
        block_size=3,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=7,
        tensor_parallel_size=size,
    )


@pytest.fixture(scope="module", params=[2, 4])  # 4 ranks: two share each head of keys and values
def shared_out(
    checkpoint: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[int, RankedRunner]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENSTOCK_KERNELS", "reference")
        config, phases = settings(checkpoint, request.param), dict[str, float]()
        runner = make_ranked_runner(checkpoint, config, NUM_BLOCKS, (EOS,), phases, timeout_s=60.0)
        assert {"ranks", "load"} <= set(phases)
        yield request.param, runner
        runner.close()


def test_tokens_equal_the_naive_loop(
    shared_out: tuple[int, RankedRunner], checkpoint: Path, oracle: Oracle
) -> None:
    size, runner = shared_out
    info = EngineInfo(
        model="tiny",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        dtype="float32",
        block_size=3,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=MAX_NUM_SEQS,
    )
    core = EngineCore(settings(checkpoint, size), info, runner)
    odd = {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2, "logprobs": 2}
    requests = [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=[(7 * i + index) % EOS for i in range(2 + 3 * index)],
            params=SamplingParams(
                **{"temperature": 0.0, **(odd if index % 3 == 1 else {})},
                seed=index,
                max_tokens=14,
                ignore_eos=index % 2 == 0,
            ),
        )
        for index in range(7)
    ]
    outputs = run(core, requests, arrivals={"4": 3, "6": 9})
    num_forgiven = 0
    for request in requests:
        found = outputs[request.request_id]
        params, seed = request.params, request.params.seed
        assert seed is not None
        wanted = oracle.generate(
            request.prompt_token_ids, params, seed, MAX_MODEL_LEN, engine=found.token_ids
        )
        assert (found.token_ids, found.finish) == (wanted.token_ids, wanted.finish), request
        assert len(found.logprobs) == (len(found.token_ids) if params.logprobs else 0)
        num_forgiven += wanted.num_forgiven
    assert num_forgiven == 0
    assert core.stats.num_preemptions > 0
    assert core.stats.num_chunks > 0
    runner.launch(StepPlan([], [], list(range(MAX_NUM_SEQS)), []))

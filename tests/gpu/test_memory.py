"""Memory on the GPU: what is taken is what was planned, and no traffic takes more."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from benchmarks.gpu import shapes
from benchmarks.gpu.device import Device, release
from benchmarks.gpu.engines import config_of, drain, plan_of, prompts, timed

from penstock.engine.core import EngineCore
from penstock.types import EngineRequest, SamplingParams

pytestmark = pytest.mark.gpu

SHAPE = "llama-3.2-1b"
TRAFFIC_S = 20.0


SETTINGS = {"max_model_len": 8192, "max_num_seqs": 64, "max_num_batched_tokens": 8192}


def fill(core: EngineCore) -> None:
    """The largest steps there are: full prefills, full decodes, every kind of sampling at once."""
    info, rng = core.info, random.Random(0)
    long = prompts(rng, 2, info.max_model_len - 40, info.vocab_size)
    timed(core, [(prompt, 8) for prompt in long], temperature=0.8)
    for index, prompt in enumerate(prompts(rng, info.max_num_seqs, 300, info.vocab_size)):
        params = SamplingParams(
            temperature=0.8,
            top_p=0.9,
            top_k=50,
            frequency_penalty=0.5,
            logprobs=5,
            prompt_logprobs=2 if index < 4 else None,
            max_tokens=8,
            ignore_eos=True,
        )
        core.add(EngineRequest(request_id=f"f{index}", prompt_token_ids=prompt, params=params))
    drain(core)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_cache_memory_bytes": 1 << 30}],
    ids=["every request at full length", "1 GiB of keys and values"],
)
def test_peak_is_the_plan(settings: dict[str, Any]) -> None:
    """Measured on the device, so that what libraries take beside torch's own allocator counts."""
    release(Device())
    torch.cuda.synchronize()  # there is a context, as the plan assumes
    with shapes.directory(SHAPE) as directory:
        config = config_of(directory, **SETTINGS, **settings)
        free_before, _ = torch.cuda.mem_get_info()
        plan = plan_of(config)
        core = EngineCore.from_config(config)
    torch.cuda.reset_peak_memory_stats()
    fill(core)
    torch.cuda.synchronize()
    free_after, _ = torch.cuda.mem_get_info()
    taken = free_before - free_after
    reserved = torch.cuda.max_memory_reserved()
    told = "\n".join([*plan.lines, f"taken {taken:,}, by torch's allocator {reserved:,} bytes"])
    assert taken == pytest.approx(plan.total_bytes, rel=0.03), told
    assert reserved <= plan.total_bytes, told


def test_no_traffic_takes_more_than_the_plan() -> None:
    """torch may not have a byte more than was planned, while rows, blocks and queue are full."""
    release(Device())
    with shapes.directory(SHAPE) as directory:
        config = config_of(directory, **SETTINGS, num_blocks=2560, enable_prefix_caching=True)
        plan = plan_of(config)
        _, total_bytes = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(plan.total_bytes / total_bytes)
        try:
            core = EngineCore.from_config(config)
            Traffic(core).run(TRAFFIC_S)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert core.stats.num_preemptions > 0, "the pool was never full"
    assert core.stats.num_prefix_hit_tokens > 0


class Traffic:
    """Random requests of every kind, always more than can run; some are aborted."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.rng = random.Random(1)
        self.wanted: dict[str, int] = {}  # of each live request: tokens that are to come
        self.num_added = 0
        self.shared = prompts(self.rng, 4, 1024, core.info.vocab_size)

    def run(self, seconds: float) -> None:
        """Keep the engine full for so long, then let it finish."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            while len(self.wanted) < 2 * self.core.info.max_num_seqs:
                self.add()
            self.step()
            if self.rng.random() < 0.02:
                request_id = self.rng.choice(list(self.wanted))
                self.core.abort(request_id)
                del self.wanted[request_id]
        while self.core.has_work:
            self.step()
        assert not self.wanted
        self.core.scheduler.check()
        assert self.num_added > 3 * self.core.info.max_num_seqs

    def add(self) -> None:
        rng, info = self.rng, self.core.info
        # Most are short, some fill the whole context.
        length = min(int(rng.lognormvariate(6, 1)) + 1, info.max_model_len - 2)
        (prompt,) = prompts(rng, 1, length, info.vocab_size)
        if rng.random() < 0.3:
            prompt = [*rng.choice(self.shared), *prompt][: info.max_model_len - 2]
        most = min(400, info.max_model_len - len(prompt))
        num_output = rng.randint(1, most)
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 40]),
            min_p=rng.choice([0.0, 0.05]),
            presence_penalty=rng.choice([0.0, 0.0, 0.4]),
            logprobs=rng.choice([None, None, None, 3]),
            prompt_logprobs=1 if rng.random() < 0.02 else None,
            max_tokens=num_output,
            ignore_eos=True,
        )
        request_id = f"t{self.num_added}"
        self.num_added += 1
        self.wanted[request_id] = num_output
        request = EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)
        self.core.add(request)

    def step(self) -> None:
        for event in self.core.step():
            if event.request_id not in self.wanted:
                continue
            self.wanted[event.request_id] -= len(event.token_ids)
            if event.finish is not None:
                assert self.wanted.pop(event.request_id) == 0

"""What the prefix cache costs when nothing is ever found, and gains when nine tenths are.

Two engines in one process serve the same prompts, one with the cache and one without, in turn
(A B B A), so that drift of the machine cancels. The ratio is of seconds for the same work.
"""

from __future__ import annotations

import random
import time

import torch

from benchmarks.common import environment, summary, write
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.types import EngineRequest, SamplingParams

NUM_REQUESTS = 64
PROMPT_LEN = 480
OUTPUT_LEN = 32
NUM_ROUNDS = 5  # each is A B B A


def prompts(rng: random.Random, share: float, vocab_size: int) -> list[list[int]]:
    """Prompts of which the first `share` is common to all."""
    common = [rng.randrange(vocab_size) for _ in range(int(PROMPT_LEN * share))]
    rest = PROMPT_LEN - len(common)
    return [
        [*common, *(rng.randrange(vocab_size) for _ in range(rest))] for _ in range(NUM_REQUESTS)
    ]


def serve(core: EngineCore, name: str, work: list[list[int]]) -> float:
    """Seconds until all prompts are answered, 16 at a time."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    started = time.perf_counter()
    for index, prompt in enumerate(work):
        request_id = f"{name}-{index}"
        core.add(EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params))
    while core.has_work:
        core.step()
    return time.perf_counter() - started


def engine(cached: bool) -> EngineCore:
    return EngineCore.from_config(
        EngineConfig(model="brook", max_num_seqs=16, num_blocks=2048, enable_prefix_caching=cached)
    )


def ratios(share: float, seed: int) -> dict[str, object]:
    """With the cache over without, by round, and the share of tokens that was found."""
    rng = random.Random(seed)
    with_cache, without = engine(True), engine(False)
    vocab_size = with_cache.info.vocab_size
    for core in (with_cache, without):  # shapes are warm before the clock runs
        serve(core, "warm-up", prompts(rng, 0.0, vocab_size))
    queried, hit = counters(with_cache)
    samples = []
    for number in range(NUM_ROUNDS):
        seconds = {True: 0.0, False: 0.0}
        for turn, cached in enumerate((True, False, False, True)):
            work = prompts(random.Random(f"{seed} {number} {turn // 2} {share}"), share, vocab_size)
            core = with_cache if cached else without
            seconds[cached] += serve(core, f"{number}-{turn}", work)
        samples.append(seconds[True] / seconds[False])
    queried, hit = (
        new - old for new, old in zip(counters(with_cache), (queried, hit), strict=True)
    )
    return {
        "shared_of_prompt": share,
        "hit_rate": hit / queried,
        "seconds_with_over_without": summary(samples),
        "samples": samples,
    }


def counters(core: EngineCore) -> tuple[int, int]:
    return core.stats.num_prefix_query_tokens, core.stats.num_prefix_hit_tokens


def main() -> None:
    before = environment()
    torch.set_num_threads(2)
    write("prefix_cache", {"rows": [ratios(0.0, 1), ratios(0.9, 2)]}, before)


if __name__ == "__main__":
    main()

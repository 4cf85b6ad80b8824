"""What the prefix cache costs on a GPU when nothing is found, and gains when most is.

Two engines in one process serve the same prompts, one with the cache and one without, in turn
(A B B A), so that drift cancels. The ratio is of seconds for the same work, taken within a round.
"""

from __future__ import annotations

import random
import sys
from typing import NamedTuple

from benchmarks.gpu.engines import engine, prompts, timed
from benchmarks.gpu.record import Figure, Options, Record, figure, parse, parser
from penstock.engine.core import EngineCore


class Sizes(NamedTuple):
    """How much is measured."""

    num_requests: int
    prompt_len: int
    output_len: int
    num_rounds: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int  # of each of the two


GPU = Sizes(64, 2048, 32, 3, 64, 8192, 4096, 16384)
TOY = Sizes(4, 40, 3, 2, 2, 32, 64, 64)
SHARES = (0.0, 0.9)  # of each prompt that all have in common


def ratios(
    with_cache: EngineCore, without: EngineCore, share: float, sizes: Sizes
) -> dict[str, Figure | float]:
    """Seconds with the cache over seconds without, by round, and how much was found."""
    vocab_size = with_cache.info.vocab_size
    stats = with_cache.stats
    queried, hit = stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens
    samples = []
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(sizes.num_rounds):
        spent_s = {True: 0.0, False: 0.0}
        for turn, cached in enumerate((True, False, False, True)):
            rng = random.Random(f"{number} {turn // 2} {share}")
            (common,) = prompts(rng, 1, int(sizes.prompt_len * share), vocab_size)
            own_len = sizes.prompt_len - len(common)
            own = prompts(rng, sizes.num_requests, own_len, vocab_size)
            work = [([*common, *one], sizes.output_len) for one in own]
            spent_s[cached] += timed(with_cache if cached else without, work)
        samples.append(spent_s[True] / spent_s[False])
        for cached, spent in spent_s.items():
            seconds[cached].append(spent / 2)
    queried, hit = stats.num_prefix_query_tokens - queried, stats.num_prefix_hit_tokens - hit
    return {
        "shared_of_prompt": share,
        "hit_rate": hit / queried,
        "seconds_with_over_without": figure(samples, "ratio"),
        "with_cache": figure(seconds[True], "s"),
        "without": figure(seconds[False], "s"),
    }


def measure(options: Options, sizes: Sizes) -> int:
    """Both shares on one shape: the number of figures that failed."""
    settings = {
        "max_num_seqs": sizes.max_num_seqs,
        "max_num_batched_tokens": sizes.max_num_batched_tokens,
        "max_model_len": sizes.max_model_len,
        "num_blocks": sizes.num_blocks,
    }
    with (
        Record(f"prefix-{options.shape}", options) as record,
        engine(options.shape, enable_prefix_caching=True, **settings) as with_cache,
        engine(options.shape, enable_prefix_caching=False, **settings) as without,
    ):
        warm_up = prompts(random.Random(0), 2, sizes.prompt_len, with_cache.info.vocab_size)
        for core in (with_cache, without):
            timed(core, [(prompt, sizes.output_len) for prompt in warm_up])
        for share in SHARES:
            with record.attempt(f"shared-{share:.0%}") as add:
                add(ratios(with_cache, without, share, sizes))
        return record.num_failed


def main() -> int:
    options = parse(parser(__doc__))
    return 1 if measure(options, TOY if options.toy else GPU) else 0


if __name__ == "__main__":
    sys.exit(main())

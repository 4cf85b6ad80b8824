"""1,000 requests with the lengths of real conversations, all there at once: tokens a second.

Offline throughput: every request is submitted at time 0, prompts are random, answers are as long as
the trace says, sampled with a temperature so that the sampler works too. Tokens count in both
directions: those of the prompts and those of the answers.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import lengths
from benchmarks.gpu.engines import drain, engine, submit
from benchmarks.gpu.record import Figure, Options, Record, figure, parse, parser
from penstock.engine.core import EngineCore


class Sizes(NamedTuple):
    """How much is measured."""

    num_requests: int
    num_runs: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    shrink: int = 1  # every length is divided by this


# The longest request of the trace has 14,050 tokens in; answers have up to 1,000.
GPU = Sizes(1000, 1, 256, 8192, 16384)
TOY = Sizes(6, 2, 4, 64, 256, shrink=100)
TEMPERATURE = 0.8


def run(core: EngineCore, taken: lengths.Lengths, seed: int) -> tuple[float, float, int]:
    """Seconds of one run, the number of steps and of preemptions."""
    rng = random.Random(seed)
    vocabulary = range(core.info.vocab_size)
    work = [(rng.choices(vocabulary, k=num_in), num_out) for num_in, num_out in taken.requests]
    stats = core.stats
    before = stats.num_steps, stats.num_preemptions
    started_s = time.perf_counter()
    submit(core, work, TEMPERATURE)
    num_tokens = drain(core)
    seconds = time.perf_counter() - started_s
    wanted = sum(num_out for _, num_out in taken.requests)
    if num_tokens != wanted:
        raise RuntimeError(f"{num_tokens} tokens came, {wanted} were asked for")
    return seconds, stats.num_steps - before[0], stats.num_preemptions - before[1]


def throughput(core: EngineCore, taken: lengths.Lengths, num_runs: int) -> dict[str, Figure]:
    """Tokens a second, all and of the answers, behind a short run that warms up."""
    run(core, lengths.Lengths(taken.requests[: core.info.max_num_seqs // 4 + 1], ""), 0)
    runs = [run(core, taken, seed + 1) for seed in range(num_runs)]
    seconds, num_steps, num_preemptions = zip(*runs, strict=True)
    num_output = sum(num_out for _, num_out in taken.requests)
    facts = {"num_requests": len(taken.requests), "lengths": taken.source}
    return {
        "total": figure([taken.num_tokens / one for one in seconds], "tokens/s", **facts),
        "output": figure([num_output / one for one in seconds], "tokens/s", **facts),
        "seconds": figure(seconds, "s"),
        "steps": figure(num_steps, "steps"),
        "preemptions": figure(num_preemptions, "preemptions"),
    }


def measure(options: Options, sizes: Sizes, file: Path | None = None) -> int:
    """The throughput of one shape: the number of figures that failed."""
    taken = lengths.take(sizes.num_requests, file)
    small = [(1 + a // sizes.shrink, 1 + b // sizes.shrink) for a, b in taken.requests]
    if sizes.shrink > 1:
        taken = lengths.Lengths(small, f"{taken.source}, divided by {sizes.shrink}")
    with (
        Record(f"trace-{options.shape}", options) as record,
        engine(
            options.shape,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            enable_prefix_caching=True,
            num_blocks=64 if options.toy else None,
        ) as core,
    ):
        record.add("plan", list(core.info.plan))
        with record.attempt("throughput") as add:
            add(throughput(core, taken, sizes.num_runs))
        return record.num_failed


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--lengths", type=Path, help=f"CSV with {' and '.join(lengths.COLUMNS)}")
    made.add_argument("--runs", type=int, help="samples; default 1")
    options = parse(made)
    sizes = TOY if options.toy else GPU
    if options.runs:
        sizes = sizes._replace(num_runs=options.runs)
    return 1 if measure(options, sizes, options.lengths) else 0


if __name__ == "__main__":
    sys.exit(main())

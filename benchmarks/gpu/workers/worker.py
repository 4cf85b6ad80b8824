"""What a worker of the comparison does: load an engine, measure the cells, tell each at once.

Standard library only: another engine's environment need not have ours. Every engine is asked the
same way, through a call that returns when all tokens are there, so a decode step is the difference
of two calls, of which one gives a token and the other more; prompts are random and never repeated.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Work = list[tuple[list[int], int]]  # prompts, and the tokens of each answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is measured; the same for all engines."""

    directory: str  # of the model: a config.json
    vocab_size: int
    toy: bool
    batches: tuple[int, ...]
    context: int
    num_steps: int  # of decoding
    prefills: tuple[int, ...]
    num_rounds: int
    requests: tuple[tuple[int, int], ...]  # of the trace: tokens in, tokens out
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class Engine(ABC):
    """One inference engine in this process. Its package is imported in the methods only."""

    packages: tuple[str, ...] = ()  # whose versions are reported
    max_requests: int | None = None  # of the trace, where all of them would take too long

    @abstractmethod
    def load(self, job: Job) -> None:
        """Get ready: random weights in bfloat16, no cache of prefixes."""

    @abstractmethod
    def generate(self, work: Work) -> None:
        """Answer all at once, greedily, each with exactly its number of tokens; then return."""


def cells(engine: Engine, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each figure's name, and its samples in tokens a second."""
    rng = random.Random(0)

    def work(num: int, length: int, num_output: int) -> Work:
        return [(rng.choices(range(job.vocab_size), k=length), num_output) for _ in range(num)]

    def seconds(todo: Work) -> float:
        started_s = time.perf_counter()
        engine.generate(todo)
        return time.perf_counter() - started_s

    for batch in job.batches:
        seconds(work(batch, job.context, 4))  # kernels of this size are compiled and chosen
        samples = []
        for _ in range(job.num_rounds):
            first_s = seconds(work(batch, job.context, 1))
            whole_s = seconds(work(batch, job.context, 1 + job.num_steps))
            samples.append(batch * job.num_steps / (whole_s - first_s))
        yield f"decode-{batch}", {"samples": samples, "context": job.context}
    for length in job.prefills:
        seconds(work(1, length, 1))
        samples = [length / seconds(work(1, length, 1)) for _ in range(job.num_rounds)]
        yield f"prefill-{length}", {"samples": samples}
    requests = job.requests[: engine.max_requests]
    todo = [(work(1, num_in, 0)[0][0], num_out) for num_in, num_out in requests]
    num_tokens = sum(map(sum, requests))
    yield "trace", {"samples": [num_tokens / seconds(todo)], "num_requests": len(requests)}


def main(engine: Engine) -> int:
    """Measure the job that the first argument names."""
    arguments = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**arguments)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what engines print is no result

    def tell(**line: Any) -> None:
        replies.write(json.dumps(line) + "\n")
        replies.flush()

    try:
        started_s = time.perf_counter()
        engine.load(job)
        loaded_s = time.perf_counter() - started_s
        versions = {name: version(name) for name in engine.packages}
        tell(name="load", value={"seconds": loaded_s, "versions": versions})
        for name, value in cells(engine, job):
            tell(name=name, value=value)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()  # whatever an engine raises is the reason for its missing rows
        tell(error=" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

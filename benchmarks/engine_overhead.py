"""What a decode step costs beside the model: scheduler, batch building, sampling, events.

The model is replaced by one that returns the same logits at once; all else is the engine as it
serves. Reported by number of running requests, size of the vocabulary and
kind of sampling; the phases are timed in a second pass of the same steps.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import environment, summary, write
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.engine.runner import HostRunner
from penstock.engine.state import DeviceState
from penstock.models.batch import ForwardBatch
from penstock.models.spec import ModelSpec
from penstock.types import EngineInfo, EngineRequest, SamplingParams

MAX_MODEL_LEN = 1024
BLOCK_SIZE = 16
PROMPT_LEN = 128
NUM_STEPS = 150
WARMUP_STEPS = 20
KINDS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=None),
    "temperature": SamplingParams(temperature=0.8, max_tokens=None),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95, top_k=50, max_tokens=None),
    "penalties": SamplingParams(temperature=0.8, frequency_penalty=0.5, max_tokens=None),
    "logprobs": SamplingParams(temperature=0.0, logprobs=5, max_tokens=None),
}


class ConstantModel:
    """Answers at once, always with the same random logits."""

    def __init__(self, vocab_size: int, num_rows: int) -> None:
        generator = np.random.default_rng(0)
        self._logits = generator.standard_normal((num_rows, vocab_size), np.float32) * np.float32(3)
        self.spent_s = 0.0  # on copies, as a model makes new logits

    @property
    def spec(self) -> ModelSpec:
        raise AssertionError("nothing in a step asks for the shapes of the model")

    def forward(self, batch: ForwardBatch) -> None:
        """Nothing to compute."""

    @property
    def description(self) -> str:
        return "constant"

    @property
    def choose(self) -> None:
        """The sampler's own way."""

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        started_s = time.perf_counter()
        logits = self._logits[: len(rows)].copy()
        self.spent_s += time.perf_counter() - started_s
        return logits

    def hidden(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        raise AssertionError("nothing asks for hidden states")

    def classify(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        raise AssertionError("it has no classifier")


def engine(num_running: int, vocab_size: int) -> tuple[EngineCore, HostRunner, ConstantModel]:
    """An engine around the constant model, with room for all requests."""
    num_blocks = num_running * MAX_MODEL_LEN // BLOCK_SIZE
    config = EngineConfig(
        model="constant", max_num_seqs=num_running, max_num_batched_tokens=num_running * PROMPT_LEN
    )
    info = EngineInfo(
        model="constant",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=vocab_size,
        eos_token_ids=(),
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_seqs=num_running,
    )
    state = DeviceState(num_running, MAX_MODEL_LEN, BLOCK_SIZE)
    model = ConstantModel(vocab_size, num_running)
    runner = HostRunner(model, state, ())
    return EngineCore(config, info, runner), runner, model


def measure(num_running: int, vocab_size: int, params: SamplingParams) -> dict[str, Any]:
    """Microseconds a decode step with `num_running` requests, whole and by phase."""
    core, runner, model = engine(num_running, vocab_size)
    for index in range(num_running):
        prompt = [(index * 31 + position) % vocab_size for position in range(PROMPT_LEN)]
        core.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    for _ in range(WARMUP_STEPS):
        core.step()
    whole = []
    for _ in range(NUM_STEPS):
        model.spent_s, started_s = 0.0, time.perf_counter()
        core.step()
        whole.append((time.perf_counter() - started_s - model.spent_s) * 1e6)
    phases: dict[str, list[float]] = {"schedule": [], "execute": [], "commit": []}
    for _ in range(NUM_STEPS):
        marks = [time.perf_counter()]
        plan = core.scheduler.schedule()
        marks.append(time.perf_counter())
        model.spent_s = 0.0
        result = runner.execute(plan)
        marks.append(time.perf_counter())
        core.scheduler.commit(plan, result)
        marks.append(time.perf_counter())
        durations_s = [end - start for start, end in pairwise(marks)]
        durations_s[1] -= model.spent_s
        for name, duration_s in zip(phases, durations_s, strict=True):
            phases[name].append(duration_s * 1e6)
    assert core.scheduler.has_work, "the requests outlast the measurement"
    return {
        "step_us": summary(whole),
        "phases_us": {name: summary(samples)["median"] for name, samples in phases.items()},
    }


def main() -> None:
    before = environment()
    rows = []
    for vocab_size in (2048, 49152):
        for num_running in (1, 16, 64, 256):
            for kind, params in KINDS.items():
                figures = measure(num_running, vocab_size, params)
                rows.append(
                    {"vocab_size": vocab_size, "num_running": num_running, "kind": kind} | figures
                )
    write("engine_overhead", {"rows": rows}, before)


if __name__ == "__main__":
    main()

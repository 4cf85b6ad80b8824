"""Steady decoding on the GPU: the host waits for one event a step, and is a step ahead.

That none of torch's own operations waits is shown in tests/engine/test_device_runner.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from benchmarks.gpu.engines import decoding, prompts
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from penstock.engine.core import EngineCore
from penstock.engine.plan import StepPlan
from penstock.engine.runner import Step

pytestmark = pytest.mark.gpu

NUM_ROWS = 48
NUM_STEPS = 24
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
ALLOCATIONS = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost")


@contextmanager
def steady(core: EngineCore, temperature: float) -> Iterator[None]:
    """All rows decode, and have done so for some steps."""
    work = prompts(random.Random(0), NUM_ROWS, 64, core.info.vocab_size)
    with decoding(core, work, 3 * NUM_STEPS, temperature):
        for _ in range(NUM_STEPS):
            core.step()
        yield


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_waits_for_one_event(core: EngineCore, temperature: float) -> None:
    """What the profiler notes of the CUDA runtime, in the order of the host's clock."""
    with (
        steady(core, temperature),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as noted,
    ):
        for _ in range(NUM_STEPS):
            with record_function("a step"):
                core.step()
    on_host = [event for event in noted.events() if event.device_type == DeviceType.CPU]
    events = sorted(on_host, key=lambda event: event.time_range.start)
    steps = [event.time_range for event in events if event.name == "a step"]
    begin, end = min(step.start for step in steps), max(step.end for step in steps)
    calls = [
        event.name
        for event in events
        if event.name.startswith("cuda") and begin <= event.time_range.start <= end
    ]
    if not calls:
        pytest.skip("the profiler sees no calls of the CUDA runtime here")
    assert calls.count("cudaGraphLaunch") == NUM_STEPS
    assert calls.count("cudaEventSynchronize") == NUM_STEPS
    for name in (*WAITS, *ALLOCATIONS):
        assert name not in calls
    assert calls.count("cudaMemcpyAsync") <= 3 * NUM_STEPS  # up, within the device, down
    ordered = [name for name in calls if name in {"cudaGraphLaunch", "cudaEventSynchronize"}]
    assert ordered == ["cudaGraphLaunch", "cudaEventSynchronize"] * NUM_STEPS


class Watching:
    """Implements `Runner`: notes whether the device is still at a step when the next is there."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.depth = runner.depth
        self.description = runner.description
        self.last: Any = None
        self.was_busy: list[bool] = []

    def launch(self, plan: StepPlan) -> Step:
        step: Step = self.runner.launch(plan)
        if self.last is not None:
            self.was_busy.append(not self.last.done.query())
        self.last = step
        return step


def test_a_step_is_launched_before_the_one_before_is_done(core: EngineCore) -> None:
    assert core._runner.depth == 1
    with steady(core, 0.8):
        before = core._runner
        core._runner = watching = Watching(before)
        try:
            for _ in range(NUM_STEPS):
                core.step()
        finally:
            core._runner = before
    assert sum(watching.was_busy) >= 0.9 * len(watching.was_busy) > 0


def test_the_device_is_never_idle_for_long(core: EngineCore) -> None:
    """Overlap hides the host: between two steps the device waits for less than 20 us."""
    from benchmarks.gpu.device import Device
    from benchmarks.gpu.steps import overhead

    found = overhead(core, Device(), num_running=NUM_ROWS, prompt_len=64, num_steps=NUM_STEPS)
    assert found["idle_us"]["median"] < 20

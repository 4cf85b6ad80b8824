"""Where the time of a decode step goes: on the device, on the host, and idle between the two.

Owns a stand-in for the runner that notes times and changes nothing. Two passes over the same kind
of steps. In the first, events mark where each step begins and ends on the device: the time between
the end of one and the beginning of the next is what overlap has not hidden. In the second the
device is waited for before each read, and that wait is taken off: what is left is the host's work.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.engines import decoding, prompts
from benchmarks.gpu.record import Figure, figure
from penstock.engine.core import EngineCore
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.runner import Runner, Step


class Noting:
    """Implements `Runner` around another one."""

    def __init__(self, runner: Runner, device: Device) -> None:
        self._runner = runner
        self._device = device
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.waits_for_device = False
        self.waited_s = 0.0
        self.launch_s = 0.0

    @property
    def description(self) -> str:
        return self._runner.description

    @property
    def depth(self) -> int:
        return self._runner.depth

    def check(self) -> None:
        self._runner.check()

    def launch(self, plan: StepPlan) -> Step:
        begin = self._mark()
        started_s = time.perf_counter()
        step = self._runner.launch(plan)
        self.launch_s += time.perf_counter() - started_s
        if begin is not None and (end := self._mark()) is not None:
            self.marks.append((begin, end))
        return _Noted(step, self)

    def _mark(self) -> torch.cuda.Event | None:
        if not self._device.is_gpu or self.waits_for_device:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        """Before a read, in the pass that is about the host."""
        if self.waits_for_device:
            started_s = time.perf_counter()
            self._device.synchronize()
            self.waited_s += time.perf_counter() - started_s


class _Noted:
    def __init__(self, step: Step, noting: Noting) -> None:
        self._step = step
        self._noting = noting

    def read(self) -> StepResult:
        self._noting.wait()
        return self._step.read()


@contextmanager
def noting(core: EngineCore, device: Device) -> Iterator[Noting]:
    """The engine's runner is a noting one within the block."""
    runner = core._runner
    noted = Noting(runner, device)
    core._runner = noted
    try:
        yield noted
    finally:
        core._runner = runner


def overhead(
    core: EngineCore, device: Device, *, num_running: int, prompt_len: int, num_steps: int
) -> dict[str, Figure]:
    """Microseconds of a decode step with `num_running` requests, by what they are spent on."""
    rng = random.Random(num_running)
    work = prompts(rng, num_running, prompt_len, core.info.vocab_size)
    num_warm = 8
    found: dict[str, Figure] = {}
    facts: dict[str, Any] = {"num_running": num_running}
    with noting(core, device) as noted, decoding(core, work, 2 * (num_steps + num_warm)):
        facts["depth"] = noted.depth
        _steps(core, num_warm)
        noted.marks.clear()
        found["step_us"] = figure([1e6 * one for one in _steps(core, num_steps)], "us", **facts)
        if device.is_gpu:
            device.synchronize()
            found |= _on_device(noted, facts)
        noted.waits_for_device = True
        _steps(core, num_warm)
        host, launch = [], []
        for _ in range(num_steps):
            noted.waited_s = noted.launch_s = 0.0
            (whole_s,) = _steps(core, 1)
            host.append(1e6 * (whole_s - noted.waited_s))
            launch.append(1e6 * noted.launch_s)
        if not device.is_gpu:  # the model is computed by the host, inside the launch
            host = [whole - inside for whole, inside in zip(host, launch, strict=True)]
        found["host_us"] = figure(host, "us", **facts)
        found["launch_us"] = figure(launch, "us", **facts)
    return found


def _on_device(noted: Noting, facts: dict[str, Any]) -> dict[str, Figure]:
    busy = [1e3 * begin.elapsed_time(end) for begin, end in noted.marks]
    gaps = [1e3 * before[1].elapsed_time(after[0]) for before, after in pairwise(noted.marks)]
    return {
        "device_us": figure(busy, "us", **facts),
        "idle_us": figure(gaps, "us", **facts),
    }


def _steps(core: EngineCore, num_steps: int) -> list[float]:
    samples = []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        core.step()
        samples.append(time.perf_counter() - started_s)
    return samples

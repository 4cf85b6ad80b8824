"""Clocks on the device, and the two ceilings that every figure is held against.

Owns the timing: events on a GPU, the host's clock where there is none (toy size). Kernels are timed
as replays of a CUDA graph that goes round several sets of inputs, together several times as large
as the L2 cache, so that none finds its inputs there. Ceilings are measured on random data: a matrix
product on zeros is faster than any real one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from benchmarks.gpu.record import Figure, figure

L2_TIMES = 4  # inputs that are rotated take this many times the L2
MAX_SETS = 64
_COPY_BYTES = 2 << 30
_MATMUL_SIZE = 8192
_NUM_CEILING_RUNS = 20

Call = Callable[[], object]


class Device:
    """Where things are computed and how they are timed. `toy`: the CPU, whatever else there is."""

    def __init__(self, *, toy: bool = False) -> None:
        self.is_gpu = not toy
        self.torch = torch.device("cpu" if toy else "cuda")

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        if self.is_gpu:
            torch.cuda.synchronize()

    @property
    def free_bytes(self) -> int:
        """Memory that nobody has taken, this process or another; 0: not asked of a CPU."""
        return int(torch.cuda.mem_get_info()[0]) if self.is_gpu else 0

    @property
    def l2_bytes(self) -> int:
        """The size of the L2 cache."""
        if not self.is_gpu:
            return 1 << 12
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def num_sets(self, set_bytes: int) -> int:
        """How many sets of inputs of `set_bytes` to go round, so that each is out of the L2."""
        return min(MAX_SETS, 2 + L2_TIMES * self.l2_bytes // max(set_bytes, 1))

    def timed(self, launch: Call, num_runs: int) -> list[float]:
        """Seconds of each of `num_runs` runs, one after the other, after one that is not counted.

        On a GPU the time between two events around the launch: gaps between its kernels count.
        """
        launch()
        self.synchronize()
        if not self.is_gpu:
            samples = []
            for _ in range(num_runs):
                started_s = time.perf_counter()
                launch()
                samples.append(time.perf_counter() - started_s)
            return samples
        marks = [_event() for _ in range(num_runs + 1)]
        marks[0].record()
        for mark in marks[1:]:
            launch()
            mark.record()
        self.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]

    def per_call(self, calls: Sequence[Call], num_runs: int) -> list[float]:
        """Seconds of one call: of each of `num_runs` replays of all calls, one after the other.

        Args:
            calls: the same operation on several sets of inputs; each can be captured in a graph.
        """

        def all_calls() -> None:
            for call in calls:
                call()

        launch: Call = all_calls
        if self.is_gpu:
            launch = self._graph(all_calls).replay
        return [seconds / len(calls) for seconds in self.timed(launch, num_runs)]

    def _graph(self, launch: Call) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and libraries loaded before the capture
                launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        return graph


def ceilings(device: Device) -> dict[str, Figure]:
    """Copy bandwidth (bytes read and written) and the rate of a large bfloat16 product."""
    num_bytes = _COPY_BYTES if device.is_gpu else 1 << 16
    size = _MATMUL_SIZE if device.is_gpu else 32
    num_runs = _NUM_CEILING_RUNS if device.is_gpu else 3
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    copies = device.timed(lambda: target.copy_(source), num_runs)
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device.torch)
    right, out = torch.randn_like(left), torch.empty_like(left)
    products = device.timed(lambda: torch.mm(left, right.t(), out=out), num_runs)
    bandwidth = [2 * num_bytes / seconds / 1e9 for seconds in copies]
    rates = [2 * size**3 / seconds / 1e12 for seconds in products]
    return {
        "copy_gb_s": figure(bandwidth, "GB/s", bytes=2 * num_bytes),
        "matmul_tflop_s": figure(rates, "TFLOP/s", size=size, dtype="bfloat16"),
    }


def release(device: Device) -> None:
    """Give memory back that nothing holds any more, so that what comes next finds it free."""
    if device.is_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

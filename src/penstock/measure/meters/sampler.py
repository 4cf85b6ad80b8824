"""Reads the meters in a thread while something else is measured, and writes samples into the run.

Knows what can be read, not what it means: `energy` and `figures` make figures of the samples.
Samples, by source: `proc` (per arm: the process tree), `nvml` (per arm: its GPU memory; without an
arm: each GPU), `rapl` (joules since the start, by zone), `machine` (busy CPU time, memory in use),
`meter` (what the sampler itself took). Counters of energy never go back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.measure.meters import memory, nvml
from penstock.measure.meters.rapl import POWERCAP, Rapl
from penstock.measure.records import Sample
from penstock.measure.run import Writer

DEFAULT_INTERVAL_S = 1.0


class Meters:
    """What can be read on this machine. Tests give their own files and GPUs."""

    def __init__(
        self,
        *,
        proc: Path = memory.PROC,
        powercap: Path = POWERCAP,
        gpus: nvml.Gpus | None = None,
        find_gpus: bool = True,
    ) -> None:
        """Look what there is.

        Args:
            gpus: instead of those that NVML finds.
            find_gpus: False: `gpus` or none.
        """
        self.proc = proc
        self.rapl = Rapl(powercap)
        self.gpus, self.why_no_gpus = gpus, ""
        if gpus is None and find_gpus:
            self.gpus, self.why_no_gpus = nvml.find()
        elif gpus is None:
            self.why_no_gpus = "not looked for"


class _CpuTime:
    """CPU seconds of an arm that never go back, and go on where its process is started again."""

    def __init__(self) -> None:
        self._pid, self._total_s, self._before_s = 0, 0.0, 0.0

    def total_s(self, pid: int, tree_s: float) -> float:
        """All seconds so far. A child that ends while the tree is read is missing for once."""
        if pid != self._pid:
            self._pid, self._before_s = pid, self._total_s
        self._total_s = max(self._total_s, self._before_s + tree_s)
        return self._total_s


class Sampler:
    """A thread that reads the meters every `interval_s` seconds, from `start` to `stop`.

    A context manager, with and without `async`. It may be called from any thread.
    """

    def __init__(
        self,
        writer: Writer,
        pids: Mapping[str, int | None] | None = None,
        *,
        interval_s: float = DEFAULT_INTERVAL_S,
        meters: Meters | None = None,
    ) -> None:
        """Prepare; nothing is read before `start`.

        Args:
            writer: takes the samples.
            pids: the root of each arm's process tree, by the arm's name; None: no process here.
            interval_s: between two readings; 0: only at the ends and at phases.
            meters: what to read; by default whatever this machine has.
        """
        self.meters = meters or Meters()
        self._writer = writer
        self._trees: dict[str, memory.Tree] = {}
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._gpu_zero_mj: dict[int, int] = {}
        self._cpu: dict[str, _CpuTime] = {}
        self._gpu_process_bytes: list[dict[int, int]] = []  # by GPU and pid
        self._num_reads, self._cpu_s, self._wall_s = 0, 0.0, 0.0
        for arm, pid in (pids or {}).items():
            self.add(arm, pid)

    def add(self, arm: str, pid: int | None) -> None:
        """Read a process tree too, from now on."""
        if pid is not None:
            with self._lock:
                self._trees = {**self._trees, arm: memory.Tree(pid, self.meters.proc)}

    def remove(self, arm: str) -> None:
        """Read an arm's processes once more, and then not again."""
        self.read()
        with self._lock:
            self._trees = {name: one for name, one in self._trees.items() if name != arm}

    def start(self) -> None:
        """Read for the first time and go on in a thread."""
        self.read()
        if self._interval_s > 0:
            self._thread = threading.Thread(target=self._run, name="penstock-meters", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Read for the last time, and write what the reading cost."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.read(with_pss=True)
        cost = {"reads": float(self._num_reads), "cpu_s": self._cpu_s, "wall_s": self._wall_s}
        self._add("meter", cost)

    def read(self, *, with_pss: bool = False) -> None:
        """Read everything now: a millisecond or two, with PSS more."""
        with self._lock:
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            self._num_reads += 1
            self._read_machine()
            for arm, tree in self._trees.items():
                self._read_tree(arm, tree, with_pss)
            self._cpu_s += time.thread_time() - cpu_s
            self._wall_s += time.perf_counter() - wall_s

    @contextmanager
    def phase(self, name: str, *, arm: str = "", stage: str = "") -> Iterator[None]:
        """Mark a phase (`load`, `idle`, `prefill`, `decode`, ...), with readings at both its ends.

        Energy of a phase is exact only with them: between readings it is interpolated.
        """
        self.read()
        self._writer.mark(f"{name}.begin", arm=arm, stage=stage)
        try:
            yield
        finally:
            self._writer.mark(f"{name}.end", arm=arm, stage=stage)
            self.read()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._interval_s, time.monotonic())
            if self._stopped.wait(due_s - time.monotonic()):
                return
            self.read()

    def _add(self, source: str, values: dict[str, float], arm: str = "") -> None:
        if values:
            t_ns = self._writer.clock.now_ns()
            self._writer.add(Sample(t_ns=t_ns, arm=arm, source=source, values=values))

    def _read_machine(self) -> None:
        self._add("rapl", self.meters.rapl.read_j())
        if (usage := memory.machine_usage(self.meters.proc)) is not None:
            values = {"busy_cpu_s": usage.busy_cpu_s, "used_bytes": float(usage.used_bytes)}
            self._add("machine", values)
        if self.meters.gpus is None:
            return
        readings = self.meters.gpus.read()
        values = {}
        for index, one in enumerate(readings):
            if one.energy_mj is not None:
                zero_mj = self._gpu_zero_mj.setdefault(index, one.energy_mj)
                values[f"gpu{index}_j"] = (one.energy_mj - zero_mj) / 1000
            for name in ("power_w", "used_bytes", "utilization"):
                if (value := getattr(one, name)) is not None:
                    values[f"gpu{index}_{name}"] = float(value)
        self._add("nvml", values)
        self._gpu_process_bytes = [one.process_bytes for one in readings]

    def _read_tree(self, arm: str, tree: memory.Tree, with_pss: bool) -> None:
        usage = tree.read(with_pss=with_pss)
        if usage is None:
            return
        values = {
            "rss_bytes": float(usage.rss_bytes),
            "cpu_s": self._cpu.setdefault(arm, _CpuTime()).total_s(tree.pid, usage.cpu_s),
            "threads": float(usage.num_threads),
            "processes": float(len(usage.pids)),
        }
        if usage.pss_bytes is not None:
            values["pss_bytes"] = float(usage.pss_bytes)
        if usage.hwm_bytes is not None:
            values["hwm_bytes"] = float(usage.hwm_bytes)
        self._add("proc", values, arm)
        on_gpus = [
            num_bytes
            for processes in self._gpu_process_bytes
            for process, num_bytes in processes.items()
            if process in usage.pids
        ]
        if on_gpus:  # in a container the driver may name other pids, or none
            self._add("nvml", {"gpu_bytes": float(sum(on_gpus))}, arm)


async def measure_idle(sampler: Sampler, duration_s: float = 10.0) -> None:
    """Wait, with nothing running, so that `energy` can subtract what the machine takes anyway."""
    with sampler.phase("idle"):
        await asyncio.sleep(duration_s)

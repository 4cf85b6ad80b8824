"""The measurement: all engines of one precision loaded, each cell in turn, A B C and then C B A.

Owns the order, the workers' lives and the samples. Knows neither figures' meanings nor files.
Invariant: only one worker runs at a time, and a failure is a reason for one cell of one engine; a
worker that is gone is started again for the next cell.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import Cell
from benchmarks.peers.client import Worker, WorkerFailed
from benchmarks.peers.environments import variables
from benchmarks.peers.protocol import Options, Segments

LIMIT_S = 900.0  # of any one request; a hang is a reason, not the end of the run
SLOW_START_S = 20.0  # an engine that takes longer is started once only


@dataclass(slots=True)
class Samples:
    """What one precision of one model gave."""

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """figure -> engine -> round -> value"""
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    """cell -> engine -> reason"""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """engine -> package -> version"""

    def add(self, figure: str, engine: str, round_: int, value: float) -> None:
        self.values.setdefault(figure, {}).setdefault(engine, {})[round_] = value

    def fail(self, cell: str, engine: str, reason: str) -> None:
        self.failures.setdefault(cell, {})[engine] = reason
        say(f"  {engine}: {reason}")


def say(text: str) -> None:
    """To the person who waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Slot:
    """An engine's place: its worker while there is one, and how to get another."""

    def __init__(self, engine: str, python: Path, cores: list[int], options: Options) -> None:
        self.engine = engine
        self.versions: dict[str, str] = {}
        self._options = options
        self._command = [str(python), "-m", f"benchmarks.peers.workers.{engine}"]
        self._variables = variables(engine, python, cores)
        self._directory = Path(options.directory)
        self._log = self._directory.with_suffix(".log")
        self._worker: Worker | None = None

    def prepare(self) -> None:
        """Write what the engine loads and start it once, which fills its caches.

        Raises:
            WorkerFailed: it cannot; nothing is left behind.
        """
        marker = self._directory / "prepared.json"
        wanted = json.dumps(asdict(self._options))
        if marker.exists() and marker.read_text() == wanted:
            return
        say(f"preparing {self.engine}")
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        try:
            with Worker(self._command, self._variables, self._log) as worker:
                worker.call("prepare", limit_s=LIMIT_S, options=asdict(self._options))
            self.start()
        except WorkerFailed:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        finally:
            self.close()
        marker.write_text(wanted)

    def start(self) -> float:
        """A new worker, loaded and warm; seconds from its start to its first token.

        Raises:
            WorkerFailed: it cannot be started.
        """
        self.close()
        self._worker = worker = Worker(self._command, self._variables, self._log)
        try:
            options = asdict(self._options)
            loaded = worker.call("load", limit_s=LIMIT_S, options=options)
            self.versions = loaded["versions"]
            worker.call("generate", limit_s=LIMIT_S, prompts=[[("start", 16)]], num_tokens=1)
            first_token_s = time.perf_counter() - worker.started_s
            warm_up: list[Segments] = [[(f"warm-up {number}", 48)] for number in range(4)]
            for prompts in (warm_up[:1], warm_up):
                worker.call("generate", limit_s=LIMIT_S, prompts=prompts, num_tokens=4)
        except WorkerFailed:
            self.close()
            raise
        return first_token_s

    def generate(self, prompts: list[Segments], num_tokens: int) -> list[list[float]]:
        """The times of all tokens, in seconds since the prompts were submitted."""
        if self._worker is None or not self._worker.alive:
            self.start()
        assert self._worker is not None
        times: list[list[float]] = self._worker.call(
            "generate", limit_s=LIMIT_S, prompts=prompts, num_tokens=num_tokens
        )
        return times

    def peak_rss_bytes(self) -> int:
        """Of the worker that runs now.

        Raises:
            WorkerFailed: there is none.
        """
        if self._worker is None or not self._worker.alive:
            raise WorkerFailed("the process ended before")
        return self._worker.peak_rss_bytes()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def measure(
    slots: list[Slot], cells: dict[str, Cell], num_rounds: int, patience_s: float
) -> Samples:
    """All cells of all engines; the slots are closed at the end.

    Args:
        patience_s: an engine that has spent this many seconds in a cell gives no more samples.
    """
    samples = Samples()
    try:
        running = _start(slots, num_rounds, samples)
        for name, cell in cells.items():
            if name == "rss":
                _each(name, running, 1, patience_s, samples, _rss)
            elif cell.measure is not None:
                _each(name, running, num_rounds, patience_s, samples, _asking(name, cell))
        samples.versions = {slot.engine: slot.versions for slot in running}
    finally:
        for slot in slots:
            slot.close()
    return samples


Take = Callable[[Slot, int], dict[str, float]]


def _start(slots: list[Slot], num_rounds: int, samples: Samples) -> list[Slot]:
    """Start every engine, the quick ones once a round; those that run."""
    running = list(slots)
    slow: set[str] = set()

    def start(slot: Slot, round_: int) -> dict[str, float]:
        if slot.engine in slow:
            return {}
        first_token_s = slot.start()
        if first_token_s > SLOW_START_S:
            slow.add(slot.engine)
        return {"startup": first_token_s}

    for slot in slots:
        try:
            slot.prepare()
        except WorkerFailed as error:
            samples.fail("startup", slot.engine, str(error))
            running.remove(slot)
    failed = samples.failures.setdefault("startup", {})
    _each("startup", running, num_rounds, float("inf"), samples, start)
    return [slot for slot in running if slot.engine not in failed]


def _asking(name: str, cell: Cell) -> Take:
    def take(slot: Slot, round_: int) -> dict[str, float]:
        assert cell.measure is not None
        return cell.measure(slot.generate, str(round_))

    return take


def _rss(slot: Slot, round_: int) -> dict[str, float]:
    return {"rss": slot.peak_rss_bytes() / 2**30}


def _each(
    name: str, slots: list[Slot], num_rounds: int, patience_s: float, samples: Samples, take: Take
) -> None:
    """Take a cell's samples, engine after engine, every other round in the opposite order."""
    say(name)
    spent_s = dict.fromkeys((slot.engine for slot in slots), 0.0)
    for round_ in range(num_rounds):
        for slot in slots if round_ % 2 == 0 else reversed(slots):
            gone = slot.engine in samples.failures.get(name, {})
            if gone or spent_s[slot.engine] > patience_s:
                continue
            started = time.perf_counter()
            try:
                found: dict[str, Any] = take(slot, round_)
            except WorkerFailed as error:
                samples.fail(name, slot.engine, str(error))
                continue
            for figure, value in found.items():
                samples.add(figure, slot.engine, round_, value)
                say(f"  {slot.engine}: {figure} {value:.4g}")
            spent_s[slot.engine] += time.perf_counter() - started

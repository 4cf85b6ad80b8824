"""Several processes compute one model: how rank 0 keeps the others in step.

Owns the order of things: every plan goes to all ranks before this one launches it. Knows neither
models nor scheduling, and sends no tensors: a plan is all that another rank needs, because each
samples the same tokens from the same logits.
Invariant: all ranks have launched the same plans in the same order, or all have ended.
"""

from __future__ import annotations

import pkgutil
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, final

from penstock.engine.config import EngineConfig
from penstock.engine.peers import Peers
from penstock.engine.plan import Admission, StepPlan, StepResult
from penstock.engine.rank_worker import Make, Model, Ready
from penstock.engine.runner import Runner, Step
from penstock.models.load import timed
from penstock.protocol.frames import frame

MAKE_RUNNER = "penstock.engine.build:make_runner"
TIMEOUT_S = 600.0  # loading is waited for too, and a disk may be slow


def make_ranked_runner(
    path: Path,
    config: EngineConfig,
    num_blocks: int,
    eos_token_ids: tuple[int, ...],
    phases: dict[str, float],
    *,
    make: str = MAKE_RUNNER,
    timeout_s: float = TIMEOUT_S,
) -> RankedRunner:
    """The runner of rank 0, with all the others behind it; they load at the same time.

    Args:
        config: resolved; there are `tensor_parallel_size` ranks, this process included.
        make: `module:function` that makes the runner of one rank, a `rank_worker.Make`.
        timeout_s: how long a step may take, and a rank may wait for another.

    Raises:
        EngineDead: a rank died.
        ConfigError: the path is not UTF-8.
        PenstockError: what `make` raises, on any rank.
    """
    model = Model(str(path), config, num_blocks, eos_token_ids)
    size = config.tensor_parallel_size
    peers = Peers(model, size, make, timeout_s)
    try:
        with timed(phases, "ranks"):
            make_runner: Make = pkgutil.resolve_name(make)
            group = peers.meet()
        runner = make_runner(path, config, num_blocks, eos_token_ids, group, phases)
        peers.wait_for(Ready)
    except BaseException as error:
        told = peers.explain(error) if isinstance(error, Exception) else error
        peers.end()
        if told is error:
            raise
        raise told from error
    return RankedRunner(runner, peers)


@final
class RankedRunner:
    """Implements `Runner` with one of several ranks, which all others follow.

    They end with it: at `close`, when it is collected, or when this process ends.
    """

    def __init__(self, runner: Runner, peers: Peers) -> None:
        self._runner = runner
        self._peers = peers
        self.close = weakref.finalize(self, peers.end)

    @property
    def description(self) -> str:
        """That of the own runner."""
        return self._runner.description

    @property
    def depth(self) -> int:
        """That of the own runner."""
        return self._runner.depth

    def check(self) -> None:
        """EngineError: a rank has died, and all have ended."""
        self._peers.check()

    def launch(self, plan: StepPlan) -> Step:
        """Begin a step on all ranks. EngineError: one of them has died, and all have ended."""
        message = encoded(plan)
        with _undisturbed(), self._peers.together(BaseException):
            self._peers.send(message)
            step = self._runner.launch(plan)
        return _RankedStep(step, self._peers)


class _RankedStep(NamedTuple):
    """Implements `Step`."""

    step: Step
    peers: Peers

    def read(self) -> StepResult:
        """What the own rank computed. EngineError: another one has died meanwhile."""
        with self.peers.together(Exception):
            return self.step.read()


def encoded(plan: StepPlan) -> bytes:
    """A plan as the other ranks get it: without the text that only the front end reads."""
    if any(admission.params.stop for admission in plan.admitted):
        plan = plan._replace(admitted=[_without_text(admission) for admission in plan.admitted])
    return frame(plan)


def _without_text(admission: Admission) -> Admission:
    """It may hold what no message can, and no rank looks at it."""
    return admission._replace(params=replace(admission.params, stop=()))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits: ranks that are cut off at different points of a step never meet again."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # a handler of C code could not be put back, and signals come to the main thread
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)

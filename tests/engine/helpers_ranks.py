"""A runner without a model whose tokens need every rank: each adds what it knows of the row.

A rank that missed a plan, or applied it otherwise, adds something else, and the tokens are wrong.
The model's path says how loading goes, two tokens how a step goes, and a variable of the
environment how another rank than the first ends while they meet.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from penstock.engine.config import EngineConfig
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.state import DeviceState
from penstock.errors import WeightMismatch
from penstock.parallel.distributed import Distributed, PeerLost
from penstock.protocol.frames import frame

VOCAB = 1000
UNMET = "PENSTOCK_TEST_UNMET"
RAISE, INTERRUPT = 990, 991  # the last token of a row, when it is computed


def token_of(token_ids: list[int], size: int) -> int:
    """What `size` ranks give behind these tokens."""
    return sum(token_ids) * size * (size + 1) // 2 % 900


class CountedStep:
    """Implements `Step`; knows how many of its kind nobody has read."""

    num_unread = 0

    def __init__(self, result: StepResult) -> None:
        self._result = result
        CountedStep.num_unread += 1

    def read(self) -> StepResult:
        CountedStep.num_unread -= 1
        return self._result


class FakeRunner:
    """Follows plans; its depth is 1, so that reading stays behind."""

    depth = 1
    description = "fake"

    def __init__(self, state: DeviceState, group: Distributed) -> None:
        self._state = state
        self._group = group

    def launch(self, plan: StepPlan) -> CountedStep:
        state, rank = self._state, self._group.rank
        assert rank == 0 or CountedStep.num_unread <= self.depth, "unread steps pile up"
        state.apply(plan)
        rows = [s.row for s in plan.slices if s.start + s.length == state.num_tokens[s.row]]
        known = [state.token_ids[row, : state.num_tokens[row]].tolist() for row in rows]
        lasts = {token_ids[-1] for token_ids in known}
        if RAISE in lasts and rank == 1:
            raise RuntimeError("a prompt that nobody else may read")
        if INTERRUPT in lasts and rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
        own = [(rank + 1) * sum(token_ids) for token_ids in known]
        sums = torch.tensor(own, device=self._group.device)
        tokens = (self._group.all_reduce(sums) % 900).tolist()
        sampled = dict(zip(rows, tokens, strict=True))
        state.append(sampled)
        return CountedStep(StepResult({row: [token] for row, token in sampled.items()}, {}, {}))


def make(
    path: Path,
    config: EngineConfig,
    num_blocks: int,
    eos_token_ids: tuple[int, ...],
    group: Distributed,
    phases: dict[str, float],
) -> FakeRunner:
    """One rank's; the path's name says what goes wrong on rank 1."""
    if path.name == "misfits" and group.rank == 1:
        raise WeightMismatch("`1` weights do not fit the model's config.", hint="look")
    if path.name == "exits" and group.rank == 1:
        print("out of luck", file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)
    if path.name == "leaves" and group.rank == 1:  # somebody who keeps its output open
        left = subprocess.Popen(["sleep", "30"])
        print("left", left.pid, flush=True)
        os._exit(3)
    if path.name == "garbles" and group.rank == 1:
        with socket.socket(fileno=os.dup(int(sys.argv[1]))) as connection:
            connection.sendall(frame({"type": "Nonsense"}))
    if path.name == "loses" and group.rank == 1:  # and nobody knows whom
        raise PeerLost("Rank `1` lost the others.")
    if path.name == "sleeps":
        time.sleep(60)
    if path.name != "loses":  # as a warm-up does: the others wait here for who fails
        group.all_reduce(torch.ones(1, device=group.device))
    state = DeviceState(config.max_num_seqs, config.context_len, config.block_size)
    return FakeRunner(state, group)


def fail(*_: object) -> None:
    """As CUDA does where a device cannot be taken."""
    raise RuntimeError("CUDA error: device busy")


def die(*_: object) -> None:
    """As the kernel does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


if "penstock.engine.rank_worker" in sys.orig_argv:
    match os.environ.get(UNMET):
        case "no device":
            Distributed.__init__ = fail  # type: ignore[assignment]
        case "fails":
            Distributed.join = fail  # type: ignore[assignment]
        case "dies":
            Distributed.join = die  # type: ignore[assignment]

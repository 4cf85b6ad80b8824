"""What the process of another rank runs: it follows the plans of rank 0 (`engine.ranks`).

Owns the messages between the two. It decides nothing and is asked nothing: plans come in, and only
how it starts and why it ends goes back. Imports little, because nothing is loaded before.
Invariant: the process ends when the socket closes, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pkgutil
import select
import shutil
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from penstock.engine.config import EngineConfig
from penstock.engine.plan import StepPlan
from penstock.engine.runner import Runner, Step
from penstock.errors import PenstockError
from penstock.protocol.frames import begin, frame
from penstock.protocol.reports import ErrorReport, Failed

if TYPE_CHECKING:  # it is made of torch
    from penstock.parallel.group import Group

logger = logging.getLogger(__name__)

LOST = 75  # exit status of a rank that ends because another one did


class Model(msgspec.Struct, frozen=True):
    """What a runner is made of, the same on every rank."""

    path: str
    config: EngineConfig  # resolved
    num_blocks: int
    eos_token_ids: tuple[int, ...]


class Place(msgspec.Struct, frozen=True):
    """The first message: what is computed, by how many, and which of them this is."""

    model: Model
    rank: int
    size: int
    directory: str  # where the ranks meet
    timeout_s: float


class Arrived(msgspec.Struct, tag=True, frozen=True):
    """The rank is about to meet the others: it has its device and has imported what it needs."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The rank has its runner, and waits for plans."""


Report = Arrived | Ready | Failed


class Make(Protocol):
    """Makes the runner of one rank; `penstock.engine.build.make_runner` is one."""

    def __call__(
        self,
        path: Path,
        config: EngineConfig,
        num_blocks: int,
        eos_token_ids: tuple[int, ...],
        group: Group,
        phases: dict[str, float],
    ) -> Runner:
        """Load the share of this rank; `group` is how it meets the others."""


def main(argv: list[str]) -> int:
    """What the rank runs. `argv`: file descriptor, `module:function` that makes the runner."""
    if (begun := begin(int(argv[0]), Place)) is None:
        return 0
    connection, messages, place = begun
    threading.Thread(target=_end_with, args=(connection, place), daemon=True).start()
    try:
        return _follow(place, argv[1], connection, messages)
    except PenstockError as error:
        report = ErrorReport.of(error)
    except Exception as error:
        logger.exception("Rank %d stopped.", place.rank)
        report = ErrorReport.of_death(error, f"Rank `{place.rank}`")
    with contextlib.suppress(ConnectionError):  # rank 0 is gone, or has another's report
        connection.sendall(frame(Failed(report)))
    return 1


def _follow(place: Place, make: str, connection: socket.socket, messages: Iterator[bytes]) -> int:
    """Make the runner, then launch every plan that comes, until rank 0 is gone: the exit status."""
    from penstock.kernels.gpu import device  # torch, only now
    from penstock.parallel.distributed import Distributed, PeerLost

    make_runner: Make = pkgutil.resolve_name(make)
    model, rank = place.model, place.rank
    decoder = msgspec.msgpack.Decoder(StepPlan)
    launched: deque[Step] = deque()
    try:
        group = Distributed(Path(place.directory), rank, place.size, device(rank), place.timeout_s)
        connection.sendall(frame(Arrived()))
        group.join()
        runner = make_runner(
            Path(model.path), model.config, model.num_blocks, model.eos_token_ids, group, {}
        )
        connection.sendall(frame(Ready()))
        for message in messages:
            launched.append(runner.launch(decoder.decode(message)))
            while len(launched) > runner.depth:  # what nobody reads must not pile up
                launched.popleft().read()
    except (ConnectionError, PeerLost) as error:  # another rank ended, and rank 0 will know which
        logger.warning("%s", error)
        return LOST
    shutil.rmtree(place.directory, ignore_errors=True)  # rank 0 has not, if it was killed
    return 0


def _end_with(connection: socket.socket, place: Place) -> None:
    """End the process when the other side of its socket is closed, even inside a collective."""
    hangup = select.poll()
    hangup.register(connection, 0)  # POLLHUP is told always
    hangup.poll()
    shutil.rmtree(place.directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's own end of a group may wait for the others

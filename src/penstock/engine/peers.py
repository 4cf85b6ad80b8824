"""The processes of the other ranks, seen from rank 0: started, watched, ended.

Owns the children and a thread that listens to them all. Knows neither plans nor models. What they
run is `engine.rank_worker`.
Invariant: the ranks end together. When one fails the others are killed, so that nobody waits in a
collective for one that is gone, and everybody here is told the first cause; when this process ends,
however it does, the sockets close and the ranks end themselves.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec

from penstock.engine import rank_worker
from penstock.engine.rank_worker import LOST, Arrived, Model, Place, Ready, Report
from penstock.errors import EngineDead
from penstock.hardware import TERMINAL
from penstock.protocol.child import Child
from penstock.protocol.frames import Frames
from penstock.protocol.reports import ErrorReport, Failed

if TYPE_CHECKING:  # it is made of torch
    from penstock.parallel.distributed import Distributed

logger = logging.getLogger(__name__)

_EXIT_S = 5.0  # how long a rank may take to end before it is killed
_CAUSE_S = 2.0  # a rank that is lost waits so long for the cause, which another's death tells
_TICK_S = 1.0  # how often the time of a step is looked at


class _Rank(Child):
    """One of them, and what is known of it."""

    def __init__(self, place: Place, make: str) -> None:
        self.number = place.rank
        self.frames = Frames()
        self.reached: set[type[Report]] = set()
        environment = {name: value for name, value in os.environ.items() if name != TERMINAL}
        program, prefix = [rank_worker.__name__, make], f"rank {place.rank}: "
        super().__init__(f"Rank `{place.rank}`", program, place, environment, prefix)
        self.socket.settimeout(place.timeout_s)


@final
class Peers:
    """All ranks but this one. `end` may be called at any time, from any thread."""

    def __init__(self, model: Model, size: int, make: str, timeout_s: float) -> None:
        """Start them; they import and wait for rank 0 then.

        Args:
            model: what they compute.
            size: how many ranks there are, this one included.
            make: `module:function` that makes the runner of a rank, a `rank_worker.Make`.
            timeout_s: how long a step may take, and a rank may wait for another.

        Raises:
            ConfigError: a name in `model` is not UTF-8.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="penstock-"))  # closed to other users
        self._timeout_s = timeout_s
        self._group: Distributed | None = None
        self._changed = threading.Condition()
        self._cause: ErrorReport | None = None
        self._is_over = False  # they are being ended: that they die is no news
        self._deadline_s = math.inf  # of the step under way
        self._patience_s = math.inf  # till then a rank that was lost waits for its cause
        self._ranks: list[_Rank] = []
        self._watcher = threading.Thread(target=self._watch, name="penstock-ranks", daemon=True)
        try:
            for number in range(1, size):
                place = Place(model, number, size, str(self._directory), timeout_s)
                self._ranks.append(_Rank(place, make))
            self._watcher.start()
        except BaseException:
            self.end()
            raise

    def wait_for(self, report: type[Report]) -> None:
        """Wait until every rank has sent this report. Raises why one does not."""

        def missing() -> list[int]:
            return [rank.number for rank in self._ranks if report not in rank.reached]

        self._wait(lambda: not missing(), lambda: f"Rank `{missing()[0]}` did not answer")

    def meet(self) -> Distributed:
        """Meet them: this process's place among the ranks, which `end` gives up.

        On a thread, because what they meet with does not notice that one of them dies meanwhile.
        """
        from penstock.kernels.gpu import device  # torch, which the others import meanwhile
        from penstock.parallel.distributed import Distributed

        self.wait_for(Arrived)
        size = len(self._ranks) + 1
        self._group = group = Distributed(self._directory, 0, size, device(0), self._timeout_s)
        joined: Future[None] = Future()

        def join() -> None:
            try:
                group.join()
                joined.set_result(None)
            except Exception as error:  # noqa: BLE001 - it is raised by who waits
                joined.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=join, name="penstock-join", daemon=True).start()
        self._wait(joined.done, lambda: "The ranks did not meet")
        joined.result()
        return group

    def check(self) -> None:
        """Raise the cause if a rank has died."""
        if self._cause is not None:
            raise self._cause.error

    def send(self, message: bytes) -> None:
        """Send every rank the same frame."""
        from penstock.parallel.distributed import PeerLost

        for rank in self._ranks:
            try:
                rank.socket.sendall(message)
            except OSError as error:
                raise PeerLost(f"Rank `{rank.number}` takes no more plans.") from error

    @contextlib.contextmanager
    def together(self, fatal: type[BaseException]) -> Iterator[None]:
        """What all ranks do at once: bounded in time; what is `fatal` here ends them all.

        Raises EngineError that names the rank and the cause, where that is not this rank's own.
        """
        self.check()
        self._deadline_s = time.monotonic() + self._timeout_s
        try:
            yield
        except fatal as error:
            told = self.explain(error)
            self._fail(ErrorReport.of_death(told))
            if told is error:
                raise
            raise told from error
        finally:
            self._deadline_s = math.inf
        self.check()

    def explain(self, error: BaseException) -> Exception:
        """What to raise for an error of this rank: the end of another one, if it is behind it."""
        from penstock.parallel.distributed import PeerLost

        is_lost = isinstance(error, PeerLost)
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None, _CAUSE_S if is_lost else 0)
        # Of other errors only torch's may come from the end of a rank, as that of an aborted group.
        if self._cause is not None and (is_lost or isinstance(error, RuntimeError)):
            return self._cause.error
        if is_lost:
            return EngineDead(str(error))
        return error if isinstance(error, Exception) else EngineDead("Rank `0` was interrupted.")

    def end(self) -> None:
        """End them and wait for it; they need no word, because their sockets close."""
        self._is_over = True
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.socket.shutdown(socket.SHUT_RDWR)  # not closed: the watcher still reads it
        deadline_s = time.monotonic() + _EXIT_S
        for rank in self._ranks:
            rank.end(max(0.0, deadline_s - time.monotonic()))
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(_EXIT_S)
        for rank in self._ranks:
            rank.socket.close()
        try:
            if self._group is not None:
                self._group.close()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(self, until: Callable[[], bool], late: Callable[[], str]) -> None:
        """Wait for what another thread notifies of. Raises the cause if a rank dies first."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None or until(), self._timeout_s)
            if self._cause is None and not until():
                raise EngineDead(f"{late()} in `{self._timeout_s:g}` s.")
        self.check()

    # --- the watcher's thread ---

    def _watch(self) -> None:
        """Listen to every rank until all are gone, and look at the clock."""
        try:
            with selectors.DefaultSelector() as selector:
                for rank in self._ranks:
                    selector.register(rank.socket, selectors.EVENT_READ, rank)
                while selector.get_map() or self._is_puzzled:
                    for key, _ in selector.select(_TICK_S):
                        if not self._receive(key.data):
                            selector.unregister(key.fileobj)
                    self._look_at_the_clock()
        except Exception as error:  # better no ranks than some that nobody watches
            logger.exception("The ranks are not watched any more.")
            self._fail(ErrorReport.of_death(error, "The watcher of the ranks"))

    @property
    def _is_puzzled(self) -> bool:
        """Whether a rank was lost, and its cause may still come."""
        return math.isfinite(self._patience_s) and self._cause is None and not self._is_over

    def _look_at_the_clock(self) -> None:
        """Some ends are told by nothing else: that of a rank which waits on its GPU for ever."""
        text = ""
        if time.monotonic() > self._deadline_s:
            text = f"The ranks did not end a step in `{self._timeout_s:g}` s."
        elif time.monotonic() > self._patience_s:
            text = "A rank lost the others, and none of them has ended; its log says more."
        if text:
            self._fail(ErrorReport("EngineDead", text))

    def _receive(self, rank: _Rank) -> bool:
        """Take what a rank says; whether it can say more."""
        data = b""
        with contextlib.suppress(OSError):
            data = rank.socket.recv(1 << 16)
        for message in rank.frames.feed(data):
            report: Report = msgspec.msgpack.decode(message, type=Report)
            if isinstance(report, Failed):
                self._fail(report.report)
            with self._changed:
                rank.reached.add(type(report))
                self._changed.notify_all()
        if not data:
            self._bury(rank)
        return bool(data)

    def _bury(self, rank: _Rank) -> None:
        """Find out how a rank ended."""
        report = rank.death(is_loading=Ready not in rank.reached)
        if rank.process.returncode == LOST:  # another's end is the cause, and is about to be seen
            self._patience_s = min(self._patience_s, time.monotonic() + _CAUSE_S)
        else:
            self._fail(report)

    def _fail(self, report: ErrorReport) -> None:
        """Note the first cause, tell everybody, and end every wait for a rank."""
        with self._changed:
            if self._cause is not None or self._is_over:
                return
            self._cause = report
            self._changed.notify_all()
        for rank in self._ranks:
            rank.process.kill()
        if self._group is not None:
            self._group.abort()

"""A target without a server: answers after a while, a few at a time, on the test's own loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from penstock.measure.load.target import Ask, Reply, identify
from penstock.measure.records import Arm, Clock, Request
from penstock.measure.run import Writer, new_header


class FakeTarget:
    """Answers with `num_out` tokens, evenly spread over `answer_s`."""

    def __init__(
        self,
        *,
        answer_s: float = 0.01,
        num_out: int = 4,
        max_running: int | None = None,
        error: Callable[[int], str | None] = lambda number: None,
        blocks_s: float = 0.0,
    ) -> None:
        self.arm = Arm(name="fake", target="fake", model="fake-model")
        self.limits: list[str] = []
        self.asked: list[Ask] = []
        self.in_flight = self.most_in_flight = 0
        self._answer_s, self._num_out, self._blocks_s = answer_s, num_out, blocks_s
        self._places = asyncio.Semaphore(max_running) if max_running else None
        self._error = error

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        identify(row, ask, self.arm)
        self.asked.append(ask)
        number = len(self.asked)
        row.t_sent_ns = clock.now_ns()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(self._blocks_s)  # noqa: ASYNC251 - a client that is too slow
        try:
            if (error := self._error(number)) is not None:
                row.error_class, row.t_done_ns = error, clock.now_ns()
                return None
            if self._places is not None:
                async with self._places:
                    await asyncio.sleep(self._answer_s)
            else:
                await asyncio.sleep(self._answer_s)
        except asyncio.CancelledError:
            row.error_class = "cut"
            raise
        finally:
            self.in_flight -= 1
        end_ns = clock.now_ns()
        step_ns = (end_ns - row.t_sent_ns) // self._num_out
        row.chunk_t_ns = [row.t_sent_ns + step_ns * (n + 1) for n in range(self._num_out)]
        row.chunk_n = [1] * self._num_out
        row.t_first_ns, row.t_last_ns = row.chunk_t_ns[0], row.chunk_t_ns[-1]
        row.t_done_ns, row.n_in, row.n_out, row.count_source = end_ns, 3, self._num_out, "usage"
        row.finish_reason = "stop"
        return Reply(text="four words of text", finish_reason="stop")

    async def close(self) -> None:
        pass


def asks(num: int) -> list[Ask]:
    return [Ask(prompt_id=f"p{number}", prompt=f"prompt {number}") for number in range(num)]


def writer_at(path: Path) -> Writer:
    return Writer(new_header("bench", settings={}, arms=[]), path)

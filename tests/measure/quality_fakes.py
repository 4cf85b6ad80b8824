"""Targets that answer without a server, and a sink for rows, for the tests of quality."""

from __future__ import annotations

from collections.abc import Callable

from penstock.measure.load.target import Ask, Reply, identify
from penstock.measure.records import Arm, Clock, Mark, Record, Request


class Fake:
    """Answers with what a function says of a question; None is a failure."""

    def __init__(self, answer: Callable[[Ask], str | None], name: str = "fake") -> None:
        self.answer = answer
        self.arm = Arm(name=name, target=name, model=name)
        self.limits: list[str] = []
        self.asked: list[Ask] = []

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        identify(row, ask, self.arm)
        self.asked.append(ask)
        row.t_sent_ns = row.t_done_ns = clock.now_ns()
        text = self.answer(ask)
        if text is None:
            row.error_class = "http_500"
            return None
        row.finish_reason = "stop"
        row.n_in, row.n_out = 10, len(text.split())
        return Reply(text=text, finish_reason="stop")

    async def close(self) -> None:
        pass


class Sink:
    """Keeps records."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.records: list[Record] = []

    def add(self, record: Record) -> None:
        self.records.append(record)

    def mark(self, name: str, *, arm: str = "", stage: str = "", **facts: object) -> None:
        self.add(Mark(t_ns=self.clock.now_ns(), name=name, arm=arm, stage=stage, facts=facts))


def text_of(ask: Ask) -> str:
    """The last message."""
    assert ask.messages
    return str(ask.messages[-1]["content"])

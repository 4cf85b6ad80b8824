"""Asks a target questions side by side and writes one graded row for each.

An error is a row without scores; it is never dropped and never asked again here. Knows no figure:
`penstock.measure.quality.figures` makes them of the rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from penstock.measure.load.target import Ask, Reply, Target, output_hash, prompt_hash
from penstock.measure.quality.questions import question_of, shortened
from penstock.measure.quality.tasks import Item, Task
from penstock.measure.quality.time_limit import TookTooLong, time_limit
from penstock.measure.records import Clock, Mark, Record, Request

GRADING_LIMIT_S = 5.0  # of one answer; more takes only a pattern that runs wild


class Sink(Protocol):
    """What rows are given to, such as `penstock.measure.run.Writer`."""

    clock: Clock

    def add(self, record: Record) -> None:
        """Keep a record."""


@dataclass(frozen=True, slots=True)
class Job:
    """A question, its row so far, and what turns an answer into scores and details of the row."""

    ask: Ask
    row: Request
    grade: Callable[[Request, Reply], None]


async def run_jobs(
    target: Target,
    jobs: Iterable[Job],
    *,
    writer: Sink,
    concurrency: int,
    on_row: Callable[[Request], None] | None = None,
) -> list[Request]:
    """Ask, grade and write, at most `concurrency` at once; the rows in the jobs' order.

    Stopped, or where grading fails, what is in flight is written as it is.
    """
    waiting = iter(jobs)  # shared: whoever is free takes the next one
    rows: list[Request] = []

    async def work() -> None:
        for job in waiting:
            row = job.row
            row.index = len(rows)
            rows.append(row)
            prompt_id = row.prompt_id
            row.prompt_hash = prompt_hash(job.ask)
            row.t_due_ns = writer.clock.now_ns()
            try:
                reply = await target.ask(job.ask, row, writer.clock)
                if reply is not None:
                    row.output, row.output_hash = reply.text, output_hash(reply.text)
                    if reply.reasoning:
                        row.details["reasoning"] = reply.reasoning
                    _grade_in_time(job, reply, writer)
            finally:
                row.prompt_id = prompt_id
                writer.add(row)
            if on_row:
                on_row(row)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return rows


def _grade_in_time(job: Job, reply: Reply, writer: Sink) -> None:
    """Grade; an answer that cannot be graded in time has no scores, and the run says so."""
    try:
        with time_limit(GRADING_LIMIT_S):
            job.grade(job.row, reply)
    except TookTooLong:
        message = (
            f"`{job.row.task}`: the answer to `{job.row.prompt_id}` could not be graded within "
            f"{GRADING_LIMIT_S:.0f} s, and counts as wrong."
        )
        job.row.details["not_graded"] = message
        facts = {"message": message}
        writer.add(Mark(t_ns=writer.clock.now_ns(), arm=job.row.arm, name="problem", facts=facts))


async def run_task(
    target: Target,
    task: Task,
    *,
    writer: Sink,
    arm: str = "",
    block: int = 0,
    limit: int | None = None,
    seed: int = 0,
    concurrency: int = 8,
    repeats: int = 1,
    keep_questions: bool = True,
    change: Callable[[Ask], Ask] | None = None,
    on_row: Callable[[Request], None] | None = None,
) -> list[Request]:
    """Ask every item of a task `repeats` times; returns the rows.

    A row carries the task's name, `prompt_id` (the item's), scores, output, both hashes, and in
    `details` what the item has, its `group`, `category` and `repeat`, and with the first repeat
    its `question`. A row whose answer did not come has an `error_class` and no scores.

    Args:
        keep_questions: put the text of the questions, shortened, into the rows.
        change: what to do to a question before it is asked, such as another temperature.
        on_row: told of every row after it was written.
    """
    name = arm or target.arm.name

    def job(item: Item, repeat: int) -> Job:
        row, ask = _row(item, repeat, task, name, block), change(item.ask) if change else item.ask
        if keep_questions and repeat == 0:
            row.details["question"] = shortened(question_of(ask))
        return Job(ask=ask, row=row, grade=partial(_grade, task, item))

    jobs = (job(item, repeat) for repeat in range(repeats) for item in task.items(limit, seed))
    return await run_jobs(target, jobs, writer=writer, concurrency=concurrency, on_row=on_row)


def _row(item: Item, repeat: int, task: Task, arm: str, block: int) -> Request:
    details = {"repeat": repeat, **item.details}
    for name in ("group", "category"):
        if value := getattr(item, name):
            details[name] = value
    return Request(arm=arm, block=block, prompt_id=item.id, task=task.name, details=details)


def _grade(task: Task, item: Item, row: Request, reply: Reply) -> None:
    row.scores = task.grade(item, reply)

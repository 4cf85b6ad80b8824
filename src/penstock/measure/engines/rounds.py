"""Measures arms in rounds: A B C, then C B A, each arm started anew in each round.

Owns the order, the stages of a round and what they leave in the run. One arm runs at a time, so
that no other takes its cores or memory, and drift of the machine hits all. An arm that fails is a
mark with its reason, and the others go on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from penstock.errors import PenstockError
from penstock.measure.engines import page_cache
from penstock.measure.engines.arms import IN_PROCESS, URL, ArmSpec
from penstock.measure.engines.launcher import Running, dialect_of, launched
from penstock.measure.engines.workload import (
    NUM_WARM_UP,
    Length,
    Work,
    asks,
    model_directory,
    takes_token_ids,
)
from penstock.measure.load.driver import closed_loop, warm_up
from penstock.measure.load.endpoint import Endpoint
from penstock.measure.load.target import Ask, Reply
from penstock.measure.load.tokens import Counter
from penstock.measure.load.words import GUESS, Words, measured
from penstock.measure.meters.memory import listening_pid
from penstock.measure.meters.sampler import Sampler, measure_idle
from penstock.measure.records import Request
from penstock.measure.run import Writer

IDLE_S = 5.0  # before the first round, where a meter of energy can be read
MAX_WARM_UP_OUT = 16  # tokens of an answer of the warm-up
FAILED, STARTED, ENDED = "failed", "started", "ended"  # of an arm in a round


@dataclass(slots=True, kw_only=True)
class Plan:
    """What is measured, and how.

    `vocab`: prompts are token ids below it, where an arm takes them; None: words everywhere.
    """

    specs: Sequence[ArmSpec]
    works: Sequence[Work]
    num_rounds: int
    seed: int
    vocab: int | None
    is_cold: bool
    log_dir: Path
    api_key: str | None
    headers: Mapping[str, str]
    ready_timeout_s: float
    request_timeout_s: float
    meter_interval_s: float


async def measure(plan: Plan, writer: Writer, say: Callable[[str], None]) -> None:
    """Run all rounds; what happens is in the run's records.

    Args:
        say: told in a line what is under way.
    """
    gone: set[str] = set()
    async with Sampler(writer, interval_s=plan.meter_interval_s) as sampler:
        if sampler.meters.rapl.zones or sampler.meters.gpus is not None:
            await measure_idle(sampler, IDLE_S)
        for round_ in range(plan.num_rounds):
            for spec in plan.specs if round_ % 2 == 0 else reversed(plan.specs):
                if spec.name in gone:
                    continue
                say(f"round {round_ + 1} of {plan.num_rounds}: {spec.name}")
                block = _Block(plan, writer, sampler, spec, round_)
                try:
                    await block.run()
                except PenstockError as error:
                    gone.add(spec.name)
                    writer.mark(
                        FAILED, arm=spec.name, stage=block.stage, round=round_, reason=str(error)
                    )
                    say(f"  {spec.name} failed: {error.message}")


class _Block:
    """One arm in one round."""

    def __init__(
        self, plan: Plan, writer: Writer, sampler: Sampler, spec: ArmSpec, round_: int
    ) -> None:
        self.plan, self.writer, self.sampler = plan, writer, sampler
        self.spec, self.round_ = spec, round_
        self.stage = "startup"
        self.words: Words = GUESS
        self.counter: Counter | None = None

    async def run(self) -> None:
        """Start the arm, ask it everything, end it."""
        plan, spec = self.plan, self.spec
        facts: dict[str, Any] = {"round": self.round_} | await asyncio.to_thread(self._page_cache)
        async with launched(
            spec,
            log_dir=plan.log_dir,
            api_key=plan.api_key if spec.kind == URL else None,
            headers=plan.headers,
            timeout_s=plan.ready_timeout_s,
            clock=self.writer.clock,
            request_timeout_s=plan.request_timeout_s,
        ) as running:
            self.sampler.add(spec.name, _pid_of(running))
            try:
                self._started(running, facts)
                if running.counter is not None:
                    self.counter, self.words = running.counter, measured(running.counter)
                for work in plan.works:
                    self.stage = work.stage
                    await self._work(running, work)
                self.writer.mark(ENDED, arm=spec.name, round=self.round_)
            finally:
                self.sampler.remove(spec.name)

    def _page_cache(self) -> dict[str, Any]:
        """Make the files cold if that was asked for, and say how warm they are."""
        if not (self.spec.is_started or self.spec.kind == IN_PROCESS):
            return {}
        files = page_cache.files_of(str(model_directory(self.spec) or self.spec.location))
        if self.plan.is_cold:
            page_cache.evict(files)
        return {"page_cache_share": page_cache.resident_share(files)}

    def _started(self, running: Running, facts: dict[str, Any]) -> None:
        told = {
            "startup": running.startup,
            "limits": [*running.target.limits, *_chat_limit(running)],
            "is_in_process": self.spec.kind == IN_PROCESS,
        }
        arm = msgspec.to_builtins(running.arm)
        self.writer.mark(STARTED, arm=self.spec.name, stage="startup", **facts, **told, about=arm)
        if running.first is not None:
            running.first.block = self.round_
            self.writer.add(running.first)
        self.sampler.read()

    async def _work(self, running: Running, work: Work) -> None:
        warm = tuple(
            Length(length.num_in, min(length.num_out, MAX_WARM_UP_OUT))
            for length in work.lengths[:NUM_WARM_UP]
        )
        rows = await warm_up(
            running.target,
            made := self._asks(running, warm, f"{work.stage} warm-up"),
            writer=self.writer,
            prepare=self._prepare,
        )
        self._refine(made, rows)
        asked = self._asks(running, work.lengths, work.stage)
        with self.sampler.phase(work.kind, arm=self.spec.name, stage=work.stage):
            await closed_loop(
                running.target,
                asked,
                concurrency=work.concurrency,
                writer=self.writer,
                stage=work.stage,
                prepare=self._prepare,
                finish=self._finish,
            )

    def _prepare(self, row: Request) -> None:
        row.arm, row.block = self.spec.name, self.round_

    def _asks(self, running: Running, lengths: Sequence[Length], name: str) -> list[Ask]:
        is_chat = dialect_of(self.spec) == "openai-chat"
        has_ids = takes_token_ids(self.spec) and not is_chat
        return asks(
            lengths,
            name=f"{name} {self.round_}",
            seed=self.plan.seed,
            vocab=self.plan.vocab if has_ids else None,
            words=self.words,
            chat=is_chat,
        )

    def _finish(self, ask: Ask, row: Request, reply: Reply | None) -> None:
        """Note how long the answer was to be, and count the prompt where the server does not."""
        row.details["asked_out"] = ask.max_tokens
        text = _text_of(ask)
        if row.ok and row.n_in is None and text is not None and self.counter is not None:
            row.n_in = self.counter.count(text)
            row.details["n_in_source"] = self.counter.source

    def _refine(self, made: Sequence[Ask], rows: Sequence[Request]) -> None:
        """Learn from the warm-up how many tokens a word is, where prompts are words."""
        texts = {ask.prompt_id: _text_of(ask) for ask in made}
        seen = [(texts[row.prompt_id], row.n_in) for row in rows if row.ok and row.prompt_id]
        told = [(text, num_in) for text, num_in in seen if text is not None]
        if told:
            self.words = self.words.refined(told)


def _pid_of(running: Running) -> int | None:
    """The root of the arm's processes, if they are on this machine and may be read."""
    if running.spec.kind == IN_PROCESS:
        return os.getpid()
    if running.spec.kind != URL:
        return running.pid
    parts = urlsplit(running.spec.location)
    if parts.hostname not in ("localhost", "127.0.0.1") or parts.port is None:
        return None
    return listening_pid(parts.port, parts.hostname)


def _chat_limit(running: Running) -> list[str]:
    """A URL is asked in chat where it has one, an engine that is started in completions."""
    target = running.target
    if running.spec.kind != URL or not isinstance(target, Endpoint) or not target.asks_in_chat:
        return []
    if "dialect" in running.spec.options:
        return []
    return [
        "Prompts are asked as chats, whose template adds tokens; `?dialect=openai-completions` "
        "behind the URL asks as engines that are started here are asked."
    ]


def _text_of(ask: Ask) -> str | None:
    if ask.messages is not None:
        return str(ask.messages[0]["content"])
    return ask.prompt if isinstance(ask.prompt, str) else None

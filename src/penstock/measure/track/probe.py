"""What a slot asks of one series: speed cells, canary answers, first tokens; each request a row.

Speed prompts are new in each slot and the same for all series of it, so that nobody answers from a
cache and everybody is asked the same. Knows targets and rows, neither databases nor schedules.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from penstock.measure.load.target import Ask, Target
from penstock.measure.load.words import WORDS
from penstock.measure.records import Clock, Request
from penstock.measure.track.config import Probe

# What a request was for, in `Request.task`.
SPEED, CANARY, FIRST_TOKEN = "speed", "canary", "first_token"

# Short questions with many possible answers: what comes first tells models and precisions apart.
CANARIES = (
    "Name a colour. Answer with one word.",
    "Name an animal. Answer with one word.",
    "Pick a number between 1 and 100. Answer with the number only.",
    "Name a city. Answer with one word.",
    "Write the first word of a story.",
    "Say something about the sea in one short sentence.",
    "What would you take to a lonely island? Answer with one word.",
    "Give a name to a dog. Answer with one word.",
)
_TOKENS_A_WORD = 1.35  # of plain English in today's tokenizers; what counts is the usage

Write = Callable[[Request], None]


def speed_asks(num: int, input_tokens: int, output_tokens: int, seed: str) -> list[Ask]:
    """Prompts of about `input_tokens` that nobody has seen, all different."""
    asks = []
    for number in range(num):
        rng = random.Random(f"{seed}/{input_tokens}/{output_tokens}/{number}")
        num_words = max(1, round(input_tokens / _TOKENS_A_WORD) - 12)
        words = " ".join(rng.choice(WORDS) for _ in range(num_words))
        asks.append(
            Ask(
                prompt_id=f"{seed}/{input_tokens}-{output_tokens}/{number}",
                messages=[
                    {
                        "role": "user",
                        "content": f"{words}\n\nWrite a long story with these words in it.",
                    }
                ],
                max_tokens=output_tokens,
                temperature=0.0,
            )
        )
    return asks


async def probe(
    target: Target,
    settings: Probe,
    canaries: Sequence[str],
    *,
    seed: str,
    clock: Clock,
    write: Write,
) -> None:
    """Ask one series everything; each request is given to `write` when it has ended.

    Args:
        canaries: prompts; those that are asked for first tokens are asked again and again.
        seed: of this slot's prompts; the same for all series of it.
    """
    asker = _Asker(target, clock, write)
    warm_up = Ask(prompt_id="warm-up", messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    await asker.ask(warm_up, phase="warmup")
    cells = list(product(settings.input_tokens, settings.output_tokens, settings.concurrency))
    random.Random(seed).shuffle(cells)  # no cell is always the one that the others have warmed up
    for number, (input_tokens, output_tokens, concurrency) in enumerate(cells):
        if number:
            await asyncio.sleep(settings.pause_s)
        num = concurrency * settings.rounds
        asks = speed_asks(num, input_tokens, output_tokens, f"{seed}/{concurrency}")
        shape = {
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "concurrency": concurrency,
        }
        await asker.concurrently(asks, concurrency, SPEED, shape)
    for number, text in enumerate(canaries):
        messages = [{"role": "user", "content": text}]
        name = f"canary/{number}"
        answer = Ask(prompt_id=name, messages=messages, max_tokens=settings.canary_tokens)
        await asker.ask(answer, task=CANARY)
        first = Ask(prompt_id=name, messages=messages, max_tokens=1, temperature=1.0)
        for _ in range(settings.first_token_samples):
            await asker.ask(first, task=FIRST_TOKEN)


class _Asker:
    """Asks and writes down."""

    def __init__(self, target: Target, clock: Clock, write: Write) -> None:
        self._target = target
        self._clock = clock
        self._write = write

    async def ask(
        self, ask: Ask, *, task: str = "", details: dict[str, Any] | None = None, **known: Any
    ) -> None:
        row = Request(t_due_ns=self._clock.now_ns(), task=task, **known)
        reply = None
        try:
            reply = await self._target.ask(ask, row, self._clock)
        finally:  # a request that the tracker's end cuts off is a row, too
            row.details |= details or {}
            if reply is not None and task in (CANARY, FIRST_TOKEN):
                row.output = reply.text or reply.reasoning
            self._write(row)

    async def concurrently(
        self, asks: list[Ask], concurrency: int, task: str, details: dict[str, Any]
    ) -> None:
        """As many clients as `concurrency`, each sends its next question after its last answer."""
        waiting = list(reversed(asks))

        async def client() -> None:
            while waiting:
                await self.ask(waiting.pop(), task=task, details=details)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())

"""Which texts two precisions of one model are compared on, and the process that compares them.

The models are loaded in a process of their own (`divergence_worker`), after the arms have ended, so
that this one needs no engine. Knows arms and rows, not how logits are made.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.engines.arms import IN_PROCESS, ArmSpec
from penstock.measure.quality.tasks import Item
from penstock.measure.records import Request

OURS = ("penstock", IN_PROCESS)
NOT_OF_THE_MODEL = frozenset({"dialect", "executable", "ready_timeout_s", "precision"})
WORKER = "penstock.measure.verdict.divergence_worker"


def is_possible(specs: tuple[ArmSpec, ArmSpec]) -> bool:
    """Whether both arms are one model on our engine, told apart by its options."""
    one, two = specs
    return (
        one.kind in OURS
        and two.kind in OURS
        and one.location == two.location
        and not any(name.startswith("env.") for spec in specs for name in spec.options)
    )


def conversations(
    rows: Iterable[Request], asked: Mapping[str, Sequence[Item]]
) -> list[dict[str, Any]]:
    """What was asked and what the base answered, in the order of the items."""
    items = {(name, item.id): item for name, some in asked.items() for item in some}
    answers = {
        (row.task, row.prompt_id): row.output
        for row in rows
        if row.stage == "quality" and row.details.get("role") == 0 and row.ok and row.output
    }
    return [
        {"prompt": item.ask.prompt, "messages": item.ask.messages, "answer": answers[key]}
        for key, item in items.items()
        if key in answers
    ]


async def divergence_windows(
    specs: tuple[ArmSpec, ArmSpec], texts: Sequence[Mapping[str, Any]], num_tokens: int
) -> AsyncIterator[dict[str, Any]]:
    """Facts of each text (`divergence.window_facts`), until `num_tokens` were compared.

    Nothing where the arms are not two precisions of one model on our engine, or without texts.

    Raises:
        ConfigError: the models could not be compared; the message has the last line of the reason.
    """
    if not is_possible(specs) or not texts:
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        WORKER,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**26,  # a line has every token of a window
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        process.stdin.write(msgspec.json.encode(_job(specs, texts, num_tokens)))
        await process.stdin.drain()
        process.stdin.close()
        num_done = 0
        async for line in process.stdout:
            facts: dict[str, Any] = msgspec.json.decode(line)
            num_done += len(facts["kl"])
            yield facts | {"num_done": num_done}
        if await process.wait():
            said = (await errors).decode("utf-8", "replace").strip().splitlines()
            raise ConfigError(
                f"The divergence of the arms was not computed: {said[-1] if said else 'no reason'}",
                hint="`--divergence-tokens 0` leaves it out",
            )
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        errors.cancel()


def _job(
    specs: tuple[ArmSpec, ArmSpec], texts: Sequence[Mapping[str, Any]], num_tokens: int
) -> dict[str, Any]:
    return {
        "model": specs[0].location,
        "options": [
            {name: value for name, value in spec.options.items() if name not in NOT_OF_THE_MODEL}
            for spec in specs
        ],
        "texts": list(texts),
        "num_tokens": num_tokens,
    }

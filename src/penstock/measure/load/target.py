"""What is measured: something that can be asked, and fills in the row of what became of it.

Knows records and what a question is; the wire is in `dialects`, `http` and `chunks`. `Target.ask`
never raises but CancelledError: whatever goes wrong is a row.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import msgspec

from penstock.measure.records import Arm, Clock, Request

_canonical = msgspec.json.Encoder(order="sorted").encode


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question, whatever the target speaks. Either `prompt` or `messages` is set.

    `fixed_length`: the answer shall have exactly `max_tokens` tokens (ignore_eos, min_tokens),
    where the target can do that. `extra` are more fields of the body; they win over ours.
    `reference` is for graders and never sent.
    """

    prompt_id: str
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    fixed_length: bool = False
    temperature: float = 0.0
    seed: int | None = None
    stop: list[str] = []
    stream: bool = True
    extra: dict[str, Any] = {}
    reference: Any = None


class Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A whole answer. `logprobs` is as the server sent it, those of a stream joined."""

    text: str
    reasoning: str = ""
    finish_reason: str | None = None
    logprobs: Any = None


class Target(Protocol):
    """Something that answers: an endpoint, or an engine in this process."""

    arm: Arm
    limits: list[str]  # sentences: what was asked for and cannot be had here

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        """Ask and wait for the whole answer; None where there is none.

        Fills in who answered, times, counts, status and error of `row`. The caller has set
        `t_due_ns`, `phase`, `stage`, `arm`, `block` and `index` before. Never raises but
        CancelledError, and then `error_class` is "cut".
        """
        ...

    async def close(self) -> None:
        """Let go of connections or engine."""
        ...


def prompt_hash(ask: Ask) -> str:
    """SHA-256 (hex) of what decides the answer except the model: the same for every target.

    Not in it: `prompt_id`, `reference`, and whether the answer is streamed.
    """
    sent = {
        name: getattr(ask, name)
        for name in ask.__struct_fields__
        if name not in {"prompt_id", "reference", "stream"}
    }
    return hashlib.sha256(_canonical(sent)).hexdigest()


def output_hash(text: str) -> str:
    """SHA-256 (hex) of an answer."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def identify(row: Request, ask: Ask, arm: Arm) -> None:
    """Say in `row` what was asked, and of whom. Every target begins with it."""
    row.prompt_id, row.prompt_hash = ask.prompt_id, prompt_hash(ask)
    row.model, row.engine, row.precision = arm.model, arm.engine, arm.precision
    row.provider = arm.provider

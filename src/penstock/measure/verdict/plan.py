"""What a comparison sets out to ask, and what of that is missing in its records.

The plan is in the header (`settings["plan"]`) before the first request is sent; every part of it
leaves a mark when it has ended. Invariant: a run that was cut, wherever, has a sentence here that
says what is missing. Pure; knows no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.measure.records import Mark, Record, Request
from penstock.measure.verdict import speed

QUALITY, REPEAT = "quality", "repeat"  # stages of graded rows: both arms, and the base again
DIVERGENCE = "divergence"
DONE = "done"  # name of the mark that a part leaves, with the part as its stage


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`settings["plan"]` of a run; what is 0 was not planned."""

    num_items: dict[str, int] = {}  # by task: asked of both arms, and of the base again
    num_chunks: int = 0  # that they are cut into
    noise_blocks: int = 0
    blocks: int = 0  # at least
    most_blocks: int = 0  # while speed cannot be told
    requests: int = 0  # in each leg of a block
    divergence_tokens: int = 0  # at most: answers may be shorter


def of_header(settings: Mapping[str, Any]) -> Plan | None:
    """The plan of a run; None: it was made of finished runs."""
    return msgspec.convert(settings["plan"], Plan) if "plan" in settings else None


def missing(plan: Plan, records: Sequence[Record], arms: tuple[str, str]) -> dict[str, str]:
    """What was planned and is not there: a sentence by part; empty: all is there."""
    ended = {one.stage for one in records if isinstance(one, Mark) and one.name == DONE}
    rows = [one for one in records if isinstance(one, Request) and one.phase == "steady"]
    found = {}
    for stage, told in (
        (QUALITY, _quality(plan, rows, arms)),
        (REPEAT, _answers(plan, rows, REPEAT, 0, arms[0])),
        (speed.NOISE, _blocks(plan, rows, speed.NOISE, plan.noise_blocks, plan.noise_blocks)),
        (speed.SPEED, _blocks(plan, rows, speed.SPEED, plan.blocks, plan.most_blocks)),
        (DIVERGENCE, _windows(plan, records)),
    ):
        if told is not None and stage not in ended:
            found[stage] = f"the run was cut in the part `{stage}` or before it: {told[1]}"
        elif told is not None and not told[0]:
            found[stage] = f"the part `{stage}` is not whole: {told[1]}"
    return found


Part = tuple[bool, str]  # whether it is whole, and how much there is


def _quality(plan: Plan, rows: Sequence[Request], arms: tuple[str, str]) -> Part | None:
    parts = [_answers(plan, rows, QUALITY, role, arm) for role, arm in enumerate(arms)]
    there = [part for part in parts if part is not None]
    return (all(part[0] for part in there), ", ".join(part[1] for part in there)) if there else None


def _answers(plan: Plan, rows: Sequence[Request], stage: str, role: int, arm: str) -> Part | None:
    """Of one arm's graded rows; an error is an answer, what was cut is none."""
    num_planned = sum(plan.num_items.values())
    if not num_planned:
        return None
    num = len(
        {
            (row.task, row.prompt_id)
            for row in rows
            if row.stage == stage and row.details.get("role") == role and row.error_class != "cut"
        }
    )
    return num >= num_planned, f"{num:,} of {num_planned:,} answers of `{arm}`"


def _blocks(
    plan: Plan, rows: Sequence[Request], stage: str, num_planned: int, most: int
) -> Part | None:
    if not num_planned:
        return None
    num = len(speed.legs_of(rows, stage, plan.requests))
    planned = f"{num_planned}" if most <= num_planned else f"{num_planned} to {most}"
    return num >= num_planned, f"{num} of {planned} planned blocks were finished"


def _windows(plan: Plan, records: Sequence[Record]) -> Part | None:
    if not plan.divergence_tokens:
        return None
    num = sum(
        len(one.facts["kl"]) for one in records if isinstance(one, Mark) and one.name == DIVERGENCE
    )
    return True, f"{num:,} of at most {plan.divergence_tokens:,} tokens were compared"

"""Which arm answers when: interleaved blocks, who goes first, how often the data is looked at.

A block is four legs, A B B A or B A A B: a drift that is linear in time cancels within it, and both
arms get the same prompts. Knows no target. The same seed gives the same design.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from penstock.measure.load.target import Ask

T = TypeVar("T")


class Leg(NamedTuple):
    """One arm under load, without a break. `part` says which half of the block's prompts."""

    role: int  # 0: the base, 1: the variant
    slot: int  # 0 to 3, in time
    part: int  # 0 or 1; each role gets each part once


def legs(block: int, seed: int) -> list[Leg]:
    """The four legs of a block; blocks start with either arm in turn, the first by the seed.

    The prompts of a part go to both arms in legs that follow one another.
    """
    first = (random.Random(f"order {seed}").randrange(2) + block) % 2
    roles = (first, 1 - first, 1 - first, first)
    return [Leg(role, slot, slot // 2) for slot, role in enumerate(roles)]


def prompts_of(prompts: Sequence[T], block: int, part: int, num: int, seed: int) -> list[T]:
    """`num` prompts for a part of a block: shuffled by the seed, taken in turn, from anew at the
    end (then in another order)."""
    start = (2 * block + part) * num
    chosen: list[T] = []
    while len(chosen) < num:
        lap, place = divmod(start + len(chosen), len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"prompts {seed} {lap}").shuffle(order)
        chosen += [prompts[index] for index in order[place : place + num - len(chosen)]]
    return chosen


def looks(num_blocks: int, max_blocks: int) -> list[int]:
    """After how many blocks the data is looked at: every `num_blocks`, and at the end."""
    return [*range(num_blocks, max_blocks, num_blocks), max(max_blocks, num_blocks)]


def chunks(items: Sequence[T], num_chunks: int, seed: int) -> list[list[T]]:
    """The items of the quality part, shuffled and cut into so many parts of about one size.

    Each chunk is asked of both arms before the next one, so that time and cost of an answer are
    paired in time too.
    """
    order = list(items)
    random.Random(f"quality {seed}").shuffle(order)
    num_chunks = max(1, min(num_chunks, len(order)))
    return [order[start::num_chunks] for start in range(num_chunks)]


def fresh(ask: Ask, nonce: str, num_tokens: int) -> Ask:
    """The same prompt as no prefix cache has seen it, with an answer of exactly `num_tokens`.

    A few characters at its very begin are new; token ids are left as they are.
    """
    more = {"max_tokens": num_tokens, "fixed_length": True, "temperature": 0.0, "stop": []}
    mark = f"[{nonce}] "
    if isinstance(ask.prompt, str):
        return msgspec.structs.replace(ask, prompt=mark + ask.prompt, **more)
    if ask.messages and isinstance(ask.messages[0].get("content"), str):
        first = ask.messages[0] | {"content": mark + ask.messages[0]["content"]}
        return msgspec.structs.replace(ask, messages=[first, *ask.messages[1:]], **more)
    return msgspec.structs.replace(ask, **more)

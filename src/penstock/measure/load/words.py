"""Prompts of given lengths, made of common words in an order that the seed decides.

Owns the word list and how many tokens its words are. The length that was asked for is aimed at;
the length that counts is what the server says a prompt had. Prompts are unique, except for the
share of their beginning that they are told to have in common.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, count, islice
from random import Random
from typing import NamedTuple

from penstock.errors import ConfigError
from penstock.measure.load.target import Ask
from penstock.measure.load.tokens import Counter
from penstock.measure.load.traces import BLOCK_TOKENS, Arrival

_COMMON = """
    the of and to in is you that it he was for on are as with his they at be this have from or
    one had by word but not what all were we when your can said there use an each which she do how
    their if will up other about out many then them these so some her would make like him into time
    has look two more write go see number no way could people my than first water been call who oil
    its now find long down day did get come made may part over new sound take only little work know
    place year live me back give most very after thing our just name good sentence man think say
    great where help through much before line right too mean old any same tell boy follow came want
    show also around form three small set put end does another well large must big even such because
    turn here why ask went men read need land different home us move try kind hand picture again
    change off play spell air away animal house point page letter mother answer found study still
    learn should world high every near add food between own below country plant last school father
    keep tree never start city earth eye light thought head under story saw left few while along
    might close something seem next hard open example begin life always those both paper together
    got group often run
"""
WORDS = tuple(_COMMON.split())
_BLOCKS_KEPT = 4096  # of a trace, in memory
_ENOUGH_WORDS = 64  # that are one token each, so that a length can be met exactly


class Lengths(NamedTuple):
    """Numbers of tokens: one number, uniform between two, or normal (and then at least 1)."""

    low: float
    high: float
    deviation: float = 0.0  # of a normal distribution around `low`

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Read `512`, `256-1024` or `normal:512:64`.

        Raises:
            ConfigError: it is something else; the message names the option.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?|normal:(\d+):(\d+)", text)
        if match is not None and match[3]:
            lengths = cls(int(match[3]), int(match[3]), int(match[4]))
        elif match is not None:
            lengths = cls(int(match[1]), int(match[2] or match[1]))
        if match is None or not 1 <= lengths.low <= lengths.high:
            raise ConfigError(
                f"`{option} {text}` is no number of tokens.",
                hint="such as `512`, `256-1024` (uniform) or `normal:512:64`",
            )
        return lengths

    def draw(self, chance: Random) -> int:
        if self.deviation:
            return max(1, round(chance.gauss(self.low, self.deviation)))
        return chance.randint(round(self.low), round(self.high))

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    @property
    def most(self) -> float:
        """The longest draw; of a normal distribution, few are longer."""
        return self.high + 2 * self.deviation


class Words(NamedTuple):
    """Words to make prompts of, and what they come to: `overhead + tokens_per_word * words`."""

    words: tuple[str, ...] = WORDS
    tokens_per_word: float = 1.3
    overhead: float = 0.0  # of a chat template, or a token that begins every text
    source: str = "a guess"

    def num_words(self, num_tokens: float, *, overhead: bool = True) -> int:
        """How many words make a text of so many tokens; at least one."""
        room = num_tokens - (self.overhead if overhead else 0.0)
        return max(1, round(room / self.tokens_per_word))

    def refined(self, prompts: Iterable[tuple[str, int | None]]) -> Words:
        """With what the server said of prompts that were made of these words: (text, n_in)."""
        seen = [(len(text.split()), num_in) for text, num_in in prompts if num_in is not None]
        if not seen:
            return self
        numbers, counts = [number for number, _ in seen], [count for _, count in seen]
        ratio = self.tokens_per_word
        if self.source != GUESS.source:
            source = f"{self.source}; template from usage of the warm-up"
        else:
            source = "words, tokens a word from usage of the warm-up"
            if len(set(numbers)) > 1:
                ratio = statistics.linear_regression(numbers, counts).slope
            else:
                ratio = statistics.median(counts) / numbers[0]
            ratio = max(ratio, 0.1)
        rest = statistics.median(count - ratio * number for number, count in seen)
        return self._replace(tokens_per_word=ratio, overhead=max(0.0, rest), source=source)


GUESS = Words()


def measured(counter: Counter) -> Words:
    """The words that are one token each, as a tokenizer counts; all, where these are few."""
    before = counter.count("a")
    single = tuple(word for word in WORDS if counter.count(f"a {word}") - before == 1)
    if len(single) >= _ENOUGH_WORDS:
        rest = counter.count(" ".join(single)) - len(single)
        return Words(single, 1.0, float(max(0, rest)), counter.source)
    empty = counter.count("")
    ratio = (counter.count(" ".join(WORDS)) - empty) / len(WORDS)
    return Words(WORDS, ratio, float(empty), counter.source)


def synthetic(
    num: int,
    *,
    input_tokens: Lengths,
    output_tokens: Lengths,
    seed: int | str,
    prefix_share: float = 0.0,
    prefix_tokens: int = 0,
    words: Words = GUESS,
    fixed_length: bool = True,
    name: str = "synthetic",
) -> list[Ask]:
    """The first `num` prompts of `endless`."""
    made = endless(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        seed=seed,
        prefix_share=prefix_share,
        prefix_tokens=prefix_tokens,
        words=words,
        fixed_length=fixed_length,
        name=name,
    )
    return list(islice(made, num))


def endless(
    *,
    input_tokens: Lengths,
    output_tokens: Lengths,
    seed: int | str,
    prefix_share: float = 0.0,
    prefix_tokens: int = 0,
    words: Words = GUESS,
    fixed_length: bool = True,
    name: str = "synthetic",
) -> Iterator[Ask]:
    """Prompts of these lengths, different ones for each `seed` and `name`.

    Args:
        prefix_share: of each prompt, from its begin, that is the same in all of a seed (0 to 1).
        prefix_tokens: put before each prompt, the same in all, besides `input_tokens`.
        fixed_length: whether answers shall be exactly as long as drawn, where the server can.
    """
    chance = Random(f"{seed}/{name}")
    common = Random(f"{seed}/common")
    head = common.choices(words.words, k=words.num_words(prefix_tokens)) if prefix_tokens else []
    shared: list[str] = []
    seen: set[int] = set()
    for index in count():
        num_words = words.num_words(input_tokens.draw(chance), overhead=not head)
        num_shared = round(prefix_share * num_words)
        if num_shared > len(shared):
            shared += common.choices(words.words, k=num_shared - len(shared))
        for _ in range(20):  # a prompt of very few words may be there already
            own = tuple(chance.choices(words.words, k=num_words - num_shared))
            if hash(own) not in seen:
                break
        seen.add(hash(own))
        yield Ask(
            prompt_id=f"{name}-{seed}-{index}",
            prompt=" ".join((*head, *shared[:num_shared], *own)),
            max_tokens=output_tokens.draw(chance),
            fixed_length=fixed_length,
        )


def for_trace(
    arrivals: Iterable[Arrival], *, seed: int, words: Words = GUESS, fixed_length: bool = True
) -> Iterator[Ask]:
    """A prompt for each arrival: its own text, else words of its length.

    Blocks with equal ids become equal text, so that a prefix cache finds what it found when the
    trace was recorded.
    """

    @lru_cache(maxsize=_BLOCKS_KEPT)
    def block(number: int) -> list[str]:
        num_words = words.num_words(BLOCK_TOKENS, overhead=False)
        return Random(f"{seed}/block/{number}").choices(words.words, k=num_words)

    for index, arrival in enumerate(arrivals):
        has_text = arrival.prompt is not None or arrival.messages is not None
        text = arrival.prompt
        if not has_text:
            num_words = words.num_words(arrival.num_in or 1)
            if arrival.prefix_blocks:
                made = list(chain.from_iterable(map(block, arrival.prefix_blocks)))[:num_words]
            else:
                made = Random(f"{seed}/trace/{index}").choices(words.words, k=num_words)
            text = " ".join(made)
        yield Ask(
            prompt_id=f"trace-{index}" if has_text else f"trace-{seed}-{index}",
            prompt=text,
            messages=arrival.messages,
            max_tokens=None if arrival.num_out is None else max(1, arrival.num_out),
            fixed_length=fixed_length and arrival.num_out is not None,
        )

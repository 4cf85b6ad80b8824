"""Graders: from the text of an answer and its references to scores. Pure, and exact.

Knows no task and no file; `grading.make` makes one from its options. A grader never raises for what
a model wrote; what a user wrote in its options is checked when it is made. Every score is between
0 and 1, and 1 is right. With several references the best one counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, DecimalException
from functools import cache
from typing import Any, Literal

import msgspec

from penstock.errors import ConfigError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Commas count where they part thousands (`1,234`, `1,00,000`): `1,2` are two numbers.
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"((?<![\w.)])[-+−])?[$€£¥]?({_DIGITS})([eE][-+]?\d+)?(?:(?<!/\d)(?<!/\d\d)\s?/\s?(\d+)(?![\d.]*/))?"
)


def squad_normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD 1.1's evaluation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of normalised words, counted with repetition.

    As SQuAD 2.0 has it: where either side has no word left, 1 if both have none, else 0.
    """
    ours, theirs = squad_normalise(answer).split(), squad_normalise(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def number_of(text: str) -> Decimal | None:
    """A number as people write it: `$1,234.50`, `12 %`, `−3`, `1/2`; None if there is none or
    several."""
    found = numbers_in(text)
    return found[0] if len(found) == 1 else None


def numbers_in(text: str) -> list[Decimal]:
    """Every number of a text, fractions as their value."""
    return [
        value for match in _NUMBER.finditer(text) if (value := _value(*match.groups())) is not None
    ]


def _value(sign: str | None, digits: str, power: str | None, divisor: str | None) -> Decimal | None:
    try:
        value = Decimal(digits.replace(",", "") + (power or ""))
        if divisor is not None:
            value /= Decimal(divisor)
        return -value if sign in ("-", "−") else value
    except DecimalException:  # such as 1/0 and 1e99999999
        return None


class Grader(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"
):
    """Options of one kind of grading, as they stand in a task file under `grader`."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores; the first is the main one."""
        raise NotImplementedError

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def corpus(self) -> dict[str, dict[str, str]]:
        """Figures of all answers together: name, and the arguments of `text_metrics.corpus`."""
        return {}

    def random_baseline(self) -> float | None:
        """What chance gets of the main score, where that means something."""
        return None

    def check(self) -> None:
        """Raise ConfigError for an option that cannot be used."""

    def check_references(self, references: Sequence[Any]) -> None:
        """Raise ConfigError for references that no answer, or every one, would meet."""

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        """The scores of an answer."""
        raise NotImplementedError


class ExactMatch(Grader, tag="exact_match", frozen=True, kw_only=True):
    """The answer is a reference, up to white space at both ends.

    `normalise: squad` also ignores case, punctuation, articles and inner white space.
    """

    ignore_case: bool = False
    normalise: Literal["none", "squad"] = "none"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("exact_match",)

    def _plain(self, text: str) -> str:
        if self.normalise == "squad":
            return squad_normalise(text)
        return text.strip().casefold() if self.ignore_case else text.strip()

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        ours = self._plain(text)
        return {"exact_match": float(any(ours == self._plain(str(one)) for one in references))}


class F1(Grader, tag="f1", frozen=True, kw_only=True):
    """Token F1 and exact match after SQuAD's normalisation."""

    @property
    def scores(self) -> tuple[str, ...]:
        return ("f1", "exact_match")

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        exact = ExactMatch(normalise="squad").grade(text, references)
        return {"f1": max(token_f1(text, str(one)) for one in references), **exact}


class Contains(Grader, tag="contains", frozen=True, kw_only=True):
    """The answer contains a reference, or every one of them (`require_all`)."""

    ignore_case: bool = True
    require_all: bool = False

    @property
    def scores(self) -> tuple[str, ...]:
        return ("contains",)

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        ours = self._plain(text)
        there = [self._plain(str(one)) in ours for one in references]
        return {"contains": float(all(there) if self.require_all else any(there))}

    def check_references(self, references: Sequence[Any]) -> None:
        if not all(str(one).strip() for one in references):
            raise ConfigError("`reference` is blank, and every answer contains that.")

    def _plain(self, text: str) -> str:
        return text.casefold() if self.ignore_case else text


class Regex(Grader, tag="regex", frozen=True, kw_only=True):
    """The pattern is found in the answer; with references, what it captures is one of them.

    The captured text is the first group, or all that matched where there is no group; of several
    matches the last one counts. It is compared without white space at both ends.
    """

    pattern: str
    ignore_case: bool = False

    @property
    def scores(self) -> tuple[str, ...]:
        return ("regex",)

    @property
    def needs_reference(self) -> bool:
        return False

    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)

    def check(self) -> None:
        try:
            self._compiled()
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"`grader.pattern` is `{self.pattern}`, which is no regular expression: {error}."
            ) from None

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        matches = list(self._compiled().finditer(text))
        if not matches or not references:
            return {"regex": float(bool(matches))}
        last = matches[-1]
        captured = (last[1] if last.re.groups else last[0]) or ""
        right = ExactMatch(ignore_case=self.ignore_case).grade(captured, references)
        return {"regex": right["exact_match"]}


class Choice(Grader, tag="choice", frozen=True, kw_only=True):
    """The letter that the answer chooses is the reference's.

    `choice_of` states the rules. `answered` tells how often a letter could be read at all.
    """

    letters: str = "ABCD"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("choice", "answered")

    def random_baseline(self) -> float | None:
        return 1 / len(self.letters)

    def check(self) -> None:
        if not self.letters.isalpha() or not self.letters.isupper() or len(self.letters) < 2:
            raise ConfigError(
                f"`grader.letters` is `{self.letters}`; it takes two or more capital letters."
            )

    def check_references(self, references: Sequence[Any]) -> None:
        for one in references:
            if _letter(one) not in set(self.letters):
                raise ConfigError(
                    f"`reference` is `{one}`, which is no letter of `{self.letters}`.",
                    hint="`grader.letters` names the choices",
                )

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        chosen = choice_of(text, self.letters)
        right = chosen is not None and any(chosen == _letter(one) for one in references)
        return {"choice": float(right), "answered": float(chosen is not None)}


def _letter(reference: Any) -> str:
    return str(reference).strip().upper()


def choice_of(text: str, letters: str = "ABCD") -> str | None:
    """The letter that an answer chooses. The first rule that finds one decides:

    1. The answer is one letter, whatever brackets, stars or stops are around it, in any case.
    2. It says so: `answer is B`, `**Answer:** (B)`, `"answer": "B"`, `\\boxed{B}`; the last such
       statement counts. A small letter must end its line; `A man` and `I think` choose nothing.
    3. It begins with a letter and `)`, `.`, `:`, a dash or a line's end.
    4. One letter, and no other one, stands in brackets or before `)`.
    """
    some = f"[{letters}]"
    bare = re.sub(r"[\s()\[\]{}*.:`'\"]", "", text)
    if len(bare) == 1:
        return bare.upper() if bare.upper() in letters else None
    said = [found for found in _said(some).findall(text) if any(found)]
    if said:
        return "".join(said[-1]).upper()
    start = re.match(
        rf"[(\[*]*({some})\**(?:[)\].:]|[ \t]*(?:\n|$)|[ \t]+[-–—][ \t])", text.lstrip()
    )
    if start:
        return str(start[1])
    bracketed = set(re.findall(rf"[(\[]({some})[)\]]|(?<![\w(])({some})\)", text))
    named = {one or other for one, other in bracketed}
    return named.pop() if len(named) == 1 else None


@cache
def _said(some: str) -> re.Pattern[str]:
    """What says which letter, of the class `some`, is the answer."""
    dress = r"[\s\"'*_`>]{0,9}"
    word = rf"(?:answer|choice|option){dress}(?:is\b)?{dress}:?{dress}[(\[*_`\"'$]{{0,9}}"
    goes_on = r"(?![\w'’]|\.\w)"
    article = r"(?![AI]\s+(?!because|since|as\b|which|is\b)[a-z])"  # the word `A`, or `I`
    last = rf"({some.lower()})(?=[)\].*`\"'$]*[ \t]*(?:\n|$))"
    return re.compile(
        rf"(?i:{word})(?:{article}({some}){goes_on}|{last})|\\boxed\{{(?:\\text\{{)?\(?({some})"
    )


class Numeric(Grader, tag="numeric", frozen=True, kw_only=True):
    """The last number of the answer is the reference, within the tolerance.

    `$`, `%` and thousands' commas do not matter, and `1/2` is 0.5. The tolerance is the larger of
    the absolute one and the relative one times the reference. `answered` tells how often there
    was a number.
    """

    tolerance: float = 0.0
    relative_tolerance: float = 0.0

    @property
    def scores(self) -> tuple[str, ...]:
        return ("numeric", "answered")

    def check(self) -> None:
        for name in ("tolerance", "relative_tolerance"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"`grader.{name}` is `{getattr(self, name)}`; it is 0 or more.")

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        found = numbers_in(text)
        if not found:
            return {"numeric": 0.0, "answered": 0.0}
        right = any(self._near(found[-1], one) for one in references)
        return {"numeric": float(right), "answered": 1.0}

    def check_references(self, references: Sequence[Any]) -> None:
        if all(number_of(str(one)) is None for one in references):
            raise ConfigError(f"`reference` is `{references[0]}`, which is not one number.")

    def _near(self, ours: Decimal, reference: Any) -> bool:
        theirs = number_of(str(reference))
        if theirs is None:
            return False
        absolute, relative = Decimal(str(self.tolerance)), Decimal(str(self.relative_tolerance))
        try:
            return abs(ours - theirs) <= max(absolute, relative * abs(theirs))
        except DecimalException:  # no such answer is near anything
            return False


class NonEmpty(Grader, tag="non_empty", frozen=True, kw_only=True):
    """There is an answer that is not blank: for prompts without references."""

    @property
    def scores(self) -> tuple[str, ...]:
        return ("non_empty",)

    @property
    def needs_reference(self) -> bool:
        return False

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        return {"non_empty": float(bool(text.strip()))}

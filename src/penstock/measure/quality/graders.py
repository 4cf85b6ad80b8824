"""Graders: from the text of an answer and its references to scores. Pure, and exact.

Knows no task and no file; `grading.make` makes one from its options. A grader never raises for what
a model wrote; what a user wrote in its options is checked when it is made. Every score is between
0 and 1, and 1 is right. With several references the best one counts.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from penstock.errors import ConfigError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+−])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


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
    """A number as people write it: `$1,234.50`, `12 %`, `−3`; None if there is none or several."""
    found = _NUMBER.findall(text)
    return _decimal(found[0]) if len(found) == 1 else None


def _decimal(written: str) -> Decimal | None:
    try:
        value = Decimal(written.replace(",", "").replace("−", "-"))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def json_in(text: str) -> Any:
    """The JSON value of an answer: the whole of it, or its only fenced block.

    Raises:
        ValueError: there is none.
    """
    fenced = _FENCE.findall(text)
    return json.loads(fenced[0] if len(fenced) == 1 else text, parse_constant=_refuse)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity


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
        there = [self._plain(str(one)) in self._plain(text) for one in references]
        return {"contains": float(all(there) if self.require_all else any(there))}

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
        except re.error as error:
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


class JsonSchema(Grader, tag="json_schema", frozen=True, kw_only=True, dict=True):
    """The answer is JSON (whole, or one fenced block) and fits the schema, draft 2020-12 unless
    the schema names another. References, where there are any, must equal the value."""

    schema: dict[str, Any]

    @property
    def scores(self) -> tuple[str, ...]:
        return ("json_schema", "json_valid")

    @property
    def needs_reference(self) -> bool:
        return False

    @cached_property
    def _validator(self) -> Validator:
        from jsonschema import Draft202012Validator, validators

        kind = validators.validator_for(self.schema, default=Draft202012Validator)
        kind.check_schema(self.schema)
        return kind(self.schema)

    def check(self) -> None:
        from jsonschema.exceptions import SchemaError

        try:
            _ = self._validator
        except SchemaError as error:
            raise ConfigError(f"`grader.schema` is no JSON schema: {error.message}.") from None
        if any(_remote(value) for value in _refs(self.schema)):
            raise ConfigError("`grader.schema` refers to another document, which is not fetched.")

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        try:
            value = json_in(text)
        except (ValueError, RecursionError):
            return {"json_schema": 0.0, "json_valid": 0.0}
        right = self._validator.is_valid(value)
        if right and references:
            right = any(value == one for one in references)
        return {"json_schema": float(right), "json_valid": 1.0}


def _refs(schema: Any) -> list[str]:
    if isinstance(schema, Mapping):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [ref for value in schema.values() for ref in _refs(value)]
    if isinstance(schema, list):
        return [ref for value in schema for ref in _refs(value)]
    return []


def _remote(ref: str) -> bool:
    return "://" in ref


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

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        chosen = choice_of(text, self.letters)
        right = chosen is not None and any(chosen == str(one).strip().upper() for one in references)
        return {"choice": float(right), "answered": float(chosen is not None)}


def choice_of(text: str, letters: str = "ABCD") -> str | None:
    """The letter that an answer chooses. The first rule that finds one decides:

    1. The answer is one letter, whatever brackets, stars or stops are around it, in any case.
    2. It says so: `answer is B`, `answer: (B)`, `\\boxed{B}`; the last such statement counts.
    3. It begins with a letter and `)`, `.`, `:` or a line's end, brackets and stars allowed.
    4. One letter, and no other one, stands in brackets or before `)`.
    """
    some = f"[{letters}]"
    bare = re.sub(r"[\s()\[\]{}*.:`'\"]", "", text)
    if len(bare) == 1:
        return bare.upper() if bare.upper() in letters else None
    said = re.findall(
        rf"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*[(\[*`]*({some})(?![\w'])|\\boxed\{{\(?({some})",
        text,
    )
    if said:
        return "".join(said[-1])
    start = re.match(rf"\s*[(\[*]*({some})[*]*(?:[)\].:]|\s*$|\s*\n)", text)
    if start:
        return str(start[1])
    bracketed = set(re.findall(rf"[(\[]({some})[)\]]|(?<![\w(])({some})\)", text))
    named = {one or other for one, other in bracketed}
    return named.pop() if len(named) == 1 else None


class Numeric(Grader, tag="numeric", frozen=True, kw_only=True):
    """The last number of the answer is the reference, within the tolerance.

    `$`, `%` and thousands' commas do not matter. The tolerance is the larger of the absolute one
    and the relative one times the reference. `answered` tells how often there was a number.
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
        found = _NUMBER.findall(text)
        ours = _decimal(found[-1]) if found else None
        if ours is None:
            return {"numeric": 0.0, "answered": 0.0}
        return {"numeric": float(any(self._near(ours, one) for one in references)), "answered": 1.0}

    def _near(self, ours: Decimal, reference: Any) -> bool:
        theirs = number_of(str(reference))
        if theirs is None:
            return False
        allowed = max(
            Decimal(str(self.tolerance)), Decimal(str(self.relative_tolerance)) * abs(theirs)
        )
        return abs(ours - theirs) <= allowed


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

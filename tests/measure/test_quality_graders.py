"""Graders against answers that were judged by hand, and properties that hold for every text."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.measure.quality.graders import choice_of, number_of, squad_normalise, token_f1
from penstock.measure.quality.grading import KINDS, make

CASES: list[tuple[Any, str, list[Any], dict[str, float]]] = [
    ("exact_match", " Paris \n", ["Paris"], {"exact_match": 1}),
    ("exact_match", "paris", ["Paris"], {"exact_match": 0}),
    (
        {"kind": "exact_match", "ignore_case": True},
        "PARIS",
        ["London", "Paris"],
        {"exact_match": 1},
    ),
    ({"kind": "exact_match", "normalise": "squad"}, "The  Paris!", ["paris"], {"exact_match": 1}),
    # SQuAD: 2 common words of 3 and 4: 2 * 2 / 7.
    ("f1", "the cat sat down", ["A cat sat quietly there"], {"f1": 4 / 7, "exact_match": 0}),
    ("f1", "x", ["y", "an X."], {"f1": 1, "exact_match": 1}),
    ("contains", "It is Paris, I think.", ["paris"], {"contains": 1}),
    ({"kind": "contains", "require_all": True}, "a b", ["a", "c"], {"contains": 0}),
    ({"kind": "regex", "pattern": r"\d{4}"}, "in 1998", [], {"regex": 1}),
    ({"kind": "regex", "pattern": r"\d{4}"}, "in 98", [], {"regex": 0}),
    ({"kind": "regex", "pattern": r"Answer: (\w+)"}, "Answer: a\nAnswer: b", ["b"], {"regex": 1}),
    ({"kind": "regex", "pattern": r"Answer: (\w+)"}, "Answer: b\nAnswer: a", ["b"], {"regex": 0}),
    ("numeric", "So 3 + 4 = 7, which is $1,234.50.", ["1234.5"], {"numeric": 1, "answered": 1}),
    ("numeric", "10 - 12 is −2", [-2], {"numeric": 1, "answered": 1}),
    ("numeric", "3-2", [2], {"numeric": 1, "answered": 1}),
    ("numeric", "none", [2], {"numeric": 0, "answered": 0}),
    ({"kind": "numeric", "tolerance": 0.5}, "2.5", [2], {"numeric": 1, "answered": 1}),
    ({"kind": "numeric", "tolerance": 0.5}, "2.51", [2], {"numeric": 0, "answered": 1}),
    ({"kind": "numeric", "relative_tolerance": 0.01}, "99", [100], {"numeric": 1, "answered": 1}),
    ("numeric", "It is 1/2", ["0.5"], {"numeric": 1, "answered": 1}),
    ("numeric", "0.5", ["1/2"], {"numeric": 1, "answered": 1}),
    ("numeric", "on 3/4/2024", ["2024"], {"numeric": 1, "answered": 1}),
    ("numeric", "one of {1,2,3}", ["3"], {"numeric": 1, "answered": 1}),
    ("numeric", "-$1,234.50", ["-1234.5"], {"numeric": 1, "answered": 1}),
    ("numeric", "1,00,000 rupees", [100000], {"numeric": 1, "answered": 1}),
    ("numeric", "1e400000000", ["5"], {"numeric": 0, "answered": 1}),
    ("numeric", "1e999999999999999999999", ["5"], {"numeric": 0, "answered": 0}),
    ("numeric", "1/0", ["5"], {"numeric": 0, "answered": 0}),
    ("choice", "The answer is B.", ["B"], {"choice": 1, "answered": 1}),
    ("choice", "I would not say.", ["B"], {"choice": 0, "answered": 0}),
    ("non_empty", " \n", [], {"non_empty": 0}),
    ("non_empty", "x", [], {"non_empty": 1}),
]
SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(("options", "text", "references", "scores"), CASES)
def test_known_answers(
    options: Any, text: str, references: list[Any], scores: dict[str, float]
) -> None:
    assert make(options).grade(text, references) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("text", "references", "right", "valid"),
    [
        ('{"n": 3}', [], 1, 1),
        ('Here:\n```json\n{"n": 3}\n```\nDone.', [], 1, 1),
        ('{"n": "3"}', [], 0, 1),
        ('{"n": 3} and more', [], 0, 0),
        ('{"n": NaN}', [], 0, 0),
        ("[" * 100_000, [], 0, 0),
        ("```" + " \n" * 100_000, [], 0, 0),
        ('{"n": 4, "n": 3}', [], 0, 0),
        ('{"n": 1, "more": true}', [{"n": 1, "more": 1}], 0, 1),
        ('{"n": 1.0}', [{"n": 1}], 1, 1),
        ('{"n": 3}', [{"n": 4}], 0, 1),
        ('{"n": 3}', [{"n": 4}, {"n": 3}], 1, 1),
    ],
)
def test_json_schema(text: str, references: list[Any], right: int, valid: int) -> None:
    grader = make({"kind": "json_schema", "schema": SCHEMA})
    assert grader.grade(text, references) == {"json_schema": right, "json_valid": valid}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b). ", "B"),
        ("**C**", "C"),
        ("e", None),
        ("The answer is C.", "C"),
        ("Answer: (D) because A is wrong", "D"),
        ("The answer is A. No, the answer is B.", "B"),
        (r"so \boxed{D}", "D"),
        ("A. Because it is so.", "A"),
        ("B) Paris", "B"),
        ("C\nIt is plain.", "C"),
        ("A man walked in.", None),
        ("I think that (B) fits.", "B"),
        ("Either (A) or (B).", None),
        ("Of A) and C), only one", None),
        ("**Answer:** B", "B"),
        ("Answer:\nB", "B"),
        ('{"answer": "B"}', "B"),
        ("<answer>B</answer>", "B"),
        ('The answer is "B".', "B"),
        ("the answer is b.", "B"),
        (r"\boxed{\text{B}}", "B"),
        ("B - Paris", "B"),
        ("The answer is A because it fits.", "A"),
        ("Answer: A man walked in.", None),
        ("the answer is a man", None),
        ("The answer is B.C.", None),
        ("The answer is not B.", None),
        ("answer " + " " * 20_000, None),
        ("answer" + '"' * 100_000, None),
        ("", None),
    ],
)
def test_choice_rules(text: str, letter: str | None) -> None:
    assert choice_of(text) == letter


@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_no_answer_breaks_a_grader(text: str, references: list[str]) -> None:
    options: dict[str, Any] = {
        "regex": {"kind": "regex", "pattern": "a+"},
        "json_schema": {"kind": "json_schema", "schema": SCHEMA},
    }
    for kind in KINDS.keys() - {"bert_score"}:
        grader = make(options.get(kind, kind))
        scores = grader.grade(text, references)
        assert scores.keys() == set(grader.scores)
        assert all(0 <= score <= 1 for score in scores.values())


@given(st.text(alphabet=string.ascii_letters + " .,'", max_size=60))
def test_f1_of_a_text_with_itself_is_1_and_is_symmetric(text: str) -> None:
    assert token_f1(text, text) == 1
    assert token_f1(text, "the answer") == token_f1("the answer", text)
    assert squad_normalise(squad_normalise(text)) == squad_normalise(text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-1e9, max_value=1e9))
def test_numbers_are_read_however_they_are_written(value: Any) -> None:
    assert number_of(str(value)) == value
    assert number_of(f"${value:,} in all") == value
    assert make("numeric").grade(f"It is {value:,}.", [str(value)])["numeric"] == 1


@given(st.sampled_from("ABCD"))
def test_a_bare_letter_is_read_in_any_dress(letter: str) -> None:
    for dress in ("{}", "({})", "**{}**", "{}.", " {}\n", "`{}`", "The answer is ({})."):
        assert choice_of(dress.format(letter)) == letter


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("no_such", "grader.kind"),
        ({"kind": "numeric", "tol": 1}, "tol"),
        ({"kind": "numeric", "tolerance": -1}, "grader.tolerance"),
        ({"kind": "regex", "pattern": "("}, "grader.pattern"),
        ({"kind": "json_schema", "schema": {"type": 3}}, "grader.schema"),
        *(
            ({"kind": "json_schema", "schema": schema}, "grader.schema")
            for schema in (
                {"$ref": "https://example.com/s"},
                {"properties": {"n": {"$dynamicRef": "https://example.com/s"}}},
                {"$id": "https://example.com/a", "items": {"$ref": "b"}},
                {"$ref": "#/$defs/none"},
                {"$ref": "#"},
                {"pattern": "("},
            )
        ),
        ({"kind": "regex", "pattern": "a{99999999999}"}, "grader.pattern"),
        ({"kind": ["regex"]}, "grader.kind"),
        ({"kind": "choice", "letters": "a"}, "grader.letters"),
        ({"kind": "chrf", "tokenizer": "no such"}, "grader.tokenizer"),
        ('{"kind": ', "grader"),
    ],
)
def test_wrong_options_are_told(options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        make(options)


def test_a_schema_fetches_nothing_and_deep_answers_do_not_break_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for schema in (
        {"$dynamicRef": "http://127.0.0.1:9/s"},
        {"$id": "http://127.0.0.1:9/", "$ref": "s"},
    ):
        with pytest.raises(ConfigError, match="not in it"):
            make({"kind": "json_schema", "schema": schema})
    fine = {"enum": [{"$ref": "http://127.0.0.1:9/s"}], "properties": {"$ref": {"type": "string"}}}
    make({"kind": "json_schema", "schema": fine})
    nested = make({"kind": "json_schema", "schema": {"items": {"$ref": "#"}}})
    assert nested.grade("[[[]]]", [])["json_schema"] == 1
    assert nested.grade("[" * 900 + "]" * 900, []) == {"json_schema": 0, "json_valid": 1}


def test_a_grader_may_be_given_as_json_text() -> None:
    assert make(json.dumps({"kind": "numeric", "tolerance": 1})) == make(
        {"kind": "numeric", "tolerance": 1.0}
    )

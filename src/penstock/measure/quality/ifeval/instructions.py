"""The 25 kinds of instructions of IFEval, each a function of the answer and its arguments.

Written after the behaviour that Zhou et al. describe ("Instruction-Following Evaluation for Large
Language Models", 2023) and their program shows, odd corners included, because scores are only
comparable where those agree: a keyword is a regular expression found anywhere, a title may be
empty of sense, bullets are counted exactly. Knows no task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from penstock.measure.quality.ifeval import words

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def instruction(name: str) -> Callable[[Check], Check]:
    """Register a check under its name in the data set."""

    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


def check(name: str, text: str, arguments: dict[str, Any]) -> bool:
    """Whether an answer follows an instruction; a blank answer follows none.

    Raises:
        KeyError: the instruction is not one of the 25.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    return bool(text.strip()) and CHECKS[name](text, **given)


def _compare(number: int, relation: str, wanted: int) -> bool:
    return number < wanted if relation == "less than" else number >= wanted


def language_of(text: str) -> str | None:
    """ISO 639-1 code by langdetect with a fixed seed; None where it cannot tell."""
    import langdetect
    from langdetect.lang_detect_exception import LangDetectException

    langdetect.DetectorFactory.seed = 0  # its guess depends on random draws
    try:
        return str(langdetect.detect(text))
    except LangDetectException:
        return None


@instruction("keywords:existence")
def _keywords(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(one, text, re.IGNORECASE) for one in keywords)


@instruction("keywords:frequency")
def _keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(keyword.strip(), text, re.IGNORECASE)
    return _compare(len(found), relation, frequency)


@instruction("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{one}\b", text, re.IGNORECASE) for one in forbidden_words)


@instruction("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@instruction("language:response_language")
def _language(text: str, language: str) -> bool:
    return language_of(text) in (language, None)  # what cannot be told counts as followed


@instruction("length_constraints:number_sentences")
def _num_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(words.sentences(text)), relation, num_sentences)


@instruction("length_constraints:number_words")
def _num_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(words.num_words(text), relation, num_words)


def _inner_blank(parts: Sequence[str]) -> bool:
    """Whether a part that is neither the first nor the last is blank."""
    return any(not part.strip() for part in parts[1:-1])


@instruction("length_constraints:number_paragraphs")
def _num_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are apart by `***`."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    return not _inner_blank(parts) and sum(bool(p.strip()) for p in parts) == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are apart by an empty line; punctuation ends the word."""
    paragraphs = text.split("\n\n")
    num_there = sum(bool(one.strip()) for one in paragraphs)
    if nth_paragraph > num_there or not paragraphs[nth_paragraph - 1].strip():
        return False
    begins = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"""[.,?!'"]""", begins)[0].lower()
    return num_there == num_paragraphs and word == first_word.lower()


@instruction("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@instruction("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), text.lower()))


@instruction("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@instruction("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(one in text for one in OPTIONS)


@instruction("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    """`*so*` counts, and `**so**` counts for what the stars within it are paired as."""
    single = [one.strip("*") for one in re.findall(r"\*[^\n*]*\*", text)]
    double = [one[2:-2] for one in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(one.strip()) for one in single + double) >= num_highlights


@instruction("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) > num_sections


@instruction("detectable_format:json_format")
def _json(text: str) -> bool:
    inner = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        inner = inner.removeprefix(fence)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def _title(text: str) -> bool:
    return any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", text))


@instruction("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = text.split("******")
    there = [part.strip() for part in parts if part.strip()]
    return not _inner_blank(parts) and len(there) == 2 and there[0] != there[1]


@instruction("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def _quotation(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


@instruction("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(len(words.words_in_capitals(text)), capital_relation, capital_frequency)


@instruction("change_case:english_capital")
def _capitals(text: str) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


@instruction("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower() and language_of(text) in ("en", None)


@instruction("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text

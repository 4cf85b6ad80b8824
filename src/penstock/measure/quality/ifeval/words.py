"""Words and sentences of English text, by rules that need no data.

The published IFEval uses NLTK: the regular expression `\\w+` for words, its Treebank tokenizer for
words in capitals, and the trained Punkt model for sentences. Punkt's model is a download, so
sentences are split by rules here; `docs/measure/eval.md` says how far that differs.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
# Abbreviations after which a sentence goes on whatever follows, and those that may end one.
_TITLES = re.compile(
    r"mr|mrs|ms|dr|prof|rev|gen|rep|sen|gov|capt|col|lt|sgt|st|hon|messrs|mt|ft|vs|fig"
)
_ABBREVIATIONS = re.compile(
    r"inc|ltd|co|corp|jr|sr|etc|ph\.d|cf|al|approx|dept|est|ave|blvd|rd|no|vol|pp|"
    r"jan|feb|aug|sept|oct|nov|dec|mon|tue|wed|thu|fri|(?:[a-z]\.)+[a-z]"
)
# A possible end: stops, what closes a quotation or bracket, then white space or the end.
_END = re.compile(r"""(?<!\S)(\S*?)([.!?]+|…)(["'”’)\]}*]*)(?:(?<=["'”’)\]}])[,;])?(?=\s|$)""")
_NEXT = re.compile(r"""\s+["'“‘(\[*]*(\S)""")


def num_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(_WORD.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences of an English text. A line's end alone ends none."""
    parts: list[str] = []
    start = 0
    for match in _END.finditer(text):
        if _ends(match, text):
            parts.append(text[start : match.end()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return [part for part in parts if _WORD.search(part)]


def _ends(match: re.Match[str], text: str) -> bool:
    """Whether what looks like an end of a sentence is one."""
    word, stops, _ = match.groups()
    following = _NEXT.match(text, match.end())
    if following is None:
        return True
    if "!" in stops or "?" in stops:
        return True
    goes_on = following[1].islower()
    bare = word.lower().lstrip("\"'“‘([*")
    if stops != "." or bare.isdigit():  # an ellipsis, or the number of a list's item
        return not goes_on
    if _TITLES.fullmatch(bare):
        return False
    if re.fullmatch(r"[A-Z]", word):  # an initial goes on; the letter of a list's item does not
        return text[: match.start()].rstrip(" \t").endswith("\n") or word == "I"
    if _ABBREVIATIONS.fullmatch(bare):
        return following[1].isupper() and bare not in {"u.s", "u.k"}
    return True


# The Treebank tokenizer's rules as far as they matter for words in capitals: signs are apart, a
# hyphen, an underscore and a full stop within a word are not, and contractions are two words.
_SIGNS = re.compile(r"""[\[\](){}<>;@#$%&?!"“”«»…]|--|\.\.\.|[,:](?=\D|$)|(?<!\w)'|'(?!\w)""")
_CONTRACTION = re.compile(r"(?i)(?<=\w)(n't|'(?:s|m|d|ll|re|ve))\b")
_JOINED = re.compile(r"(?i)\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")


def words_in_capitals(text: str) -> list[str]:
    """Words without a lower-case letter and with a capital one."""
    apart = _CONTRACTION.sub(r" \1", _SIGNS.sub(" ", text))
    apart = _JOINED.sub(lambda found: " ".join(part for part in found.groups() if part), apart)
    return [word for word in apart.split() if word.isupper()]

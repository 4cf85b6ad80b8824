"""How a text is cut before byte-level BPE, by the name that a GGUF file has for it.

Owns the table. Its source are the `tokenizer.json` files of the models that the names stand for;
which name stands for which is in llama.cpp's `llama-vocab.cpp` and `conversion/base.py`. Knows no
file. Invariant: a name that is not here is refused, because any other rule would give other ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

CL100K = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
QWEN2 = rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
TEKKEN = rf"{_MARKED_WORDS % ('', '')}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_SPACES}"
O200K = (
    _MARKED_WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?")
    + rf"|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASHES}|{_SPACES}"
)
# The letters that DeepSeek's published pattern lists: most of those that have a case.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿ"
    "ᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨ"
    "K-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲"
    "𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_FALCON = (
    r"[\p{P}$+<=>^~|`]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "[0-9]{3}",
)


class Rule(NamedTuple):
    """How a text is cut.

    Attributes:
        patterns: one after the other, each match is a piece of its own, and so is what is between.
        digits: each digit is a piece, before ("first") or after ("last") the patterns.
        gpt2: GPT-2's own pattern comes last; it is not among `patterns`.
        is_composed: the text is brought to NFC before.
        takes_words: a piece that is a token is that token, whatever merges say.
        adds_bos: unless the file says otherwise.
    """

    patterns: tuple[str, ...] = ()
    digits: str = ""
    gpt2: bool = False
    is_composed: bool = False
    takes_words: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self, *, add_prefix_space: bool) -> Any:
        """What the `tokenizers` library needs for it."""
        from tokenizers import Regex, pre_tokenizers

        digits = pre_tokenizers.Digits(individual_digits=True)
        parts: list[Any] = [digits] if self.digits == "first" else []
        parts += [pre_tokenizers.Split(Regex(text), "isolated") for text in self.patterns]
        parts += [digits] if self.digits == "last" else []
        letters = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=self.gpt2)
        return pre_tokenizers.Sequence([*parts, letters])


_GPT2 = Rule(gpt2=True)
_COMPOSED = Rule(gpt2=True, is_composed=True)
_DIGITS = Rule(digits="first", gpt2=True)
_LLAMA3 = Rule((CL100K,), takes_words=True, adds_bos=True)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Rule((CL100K,))),
    "glm4": Rule((CL100K,), takes_words=True),
    **dict.fromkeys(("qwen2", "megrez"), Rule((QWEN2,), is_composed=True)),
    "qwen35": Rule((QWEN35,)),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), Rule((QWEN2,))),
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "exaone4", "mellum"), _GPT2),
    **dict.fromkeys(("mpt", "olmo", "gpt-neox"), _COMPOSED),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone"), _DIGITS),
    "command-r": _DIGITS._replace(is_composed=True),
    "tekken": Rule((TEKKEN,), takes_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Rule((O200K,))),
    "deepseek-llm": Rule(_DEEPSEEK_LLM, digits="last"),
    "deepseek-coder": Rule(_DEEPSEEK_CODER, digits="last"),
    "deepseek-v3": Rule(_DEEPSEEK_V3),
    "falcon": Rule(_FALCON),
}

"""What the files beside a vocabulary add to it, and files that are broken or mean harm."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.text.conftest import make_bytes, make_sentencepiece
from transformers import AutoTokenizer

from penstock.errors import InvalidField, ModelLoadError, PenstockError, UnsupportedModel
from penstock.text import directory
from penstock.text.backends import BYTE_LETTERS
from penstock.text.template import MAX_S, ChatTemplate
from penstock.text.tokenizer import load_tokenizer

LETTERS = {letter: index for index, letter in enumerate(sorted(BYTE_LETTERS))}
VOCABULARY = {**LETTERS, "he": 256, "ll": 257, "<|endoftext|>": 258}
MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER: dict[str, Any] = {"added_tokens": [], "decoder": BYTES, "model": MODEL}
TEXTS = ["hello", " hello <a> <b>x", "<|endoftext|> <c>hell<d>", "[PAD]<a><a>"]


def write(path: Path, **files: Any) -> Path:
    """Files of a directory by their names, "." written as "__"; objects as JSON."""
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": False, "normalized": False, **flags}


def special(content: str, token_id: int = 3) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True, **flags}


CONFIGS: dict[str, dict[str, Any]] = {
    "none": {"tokenizer_config__json": {}},
    "decoder": {
        "tokenizer_config__json": {
            "added_tokens_decoder": {
                "259": token("<a>", special=True),
                "260": token("<b>", lstrip=True, rstrip=True),
            },
            "pad_token": "<a>",
        },
    },
    "known to the vocabulary": {
        "tokenizer_config__json": {"bos_token": "he", "extra_special_tokens": ["ll"]}
    },
    "special_tokens_map": {
        "tokenizer_config__json": {},
        "special_tokens_map__json": {
            "bos_token": {**token("ll"), "lstrip": False, "rstrip": False, "single_word": False}
        },
    },
    "added_tokens": {
        "tokenizer_config__json": {"additional_special_tokens": ["<c>"]},
        "added_tokens__json": {"<c>": 259, "<d>": 260},
    },
    "affixes": {"tokenizer_config__json": {"add_bos_token": True, "add_eos_token": True}},
    "no beginning": {"tokenizer_config__json": {"bos_token": None, "pad_token": None}},
    "another end": {"tokenizer_config__json": {"eos_token": "ll", "image_token": "he"}},
    "a space in front": {"tokenizer_config__json": {"add_prefix_space": True}},
}


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_as_transformers(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "vocab.json":
        files = {"vocab__json": VOCABULARY, "merges__txt": "#version: 0.2\nh e\nl l\n"}
        config = {"tokenizer_class": "GPT2Tokenizer"}
    elif name == "a space in front":
        pytest.skip("a tokenizer.json says that itself")
    else:
        model = {"type": "BPE", "vocab": VOCABULARY, "merges": ["h e", "l l"]}
        added = [special("<|endoftext|>", 258)]
        parts = {"pre_tokenizer": BYTES, "post_processor": BYTES, "added_tokens": added}
        files = {"tokenizer__json": {**TOKENIZER, "model": model, **parts}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    given = CONFIGS[name]
    given = {**given, "tokenizer_config__json": {**config, **given["tokenizer_config__json"]}}
    write(tmp_path, **files, **given)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for affixes in (True, False):
            ids = ours.encode(text, add_special_tokens=affixes)
            assert ids == theirs(text, add_special_tokens=affixes)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    assert ours.special_tokens == theirs.special_tokens_map


def test_strings_without_an_id_stay_text(tmp_path: Path) -> None:
    """transformers gives them new ids, for which the model has no row."""
    write(make_bytes(tmp_path), tokenizer_config__json={"pad_token": "[PAD]"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_id("[PAD]") is None
    assert tokenizer.decode(tokenizer.encode("a[PAD]b")) == "a[PAD]b"
    assert tokenizer.special_tokens == {"pad_token": "[PAD]"}


def test_tokens_of_a_sentencepiece_configuration(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path)
    config = {"added_tokens_decoder": {"3": token("<made>", special=True)}, "image_token": "<img>"}
    write(tmp_path, tokenizer_config__json=config, added_tokens__json={"<img>": 420, "<x>": 421})
    tokenizer = load_tokenizer(tmp_path)  # 3 is the model's placeholder `<0x00>`
    assert tokenizer.encode("<made><img>", add_special_tokens=False) == [3, 420]
    assert tokenizer.special_ids == {0, 1, 2, 3, 420}
    assert tokenizer.decode([3, 421, 420], skip_special_tokens=False) == "<made><x><img>"
    assert tokenizer.decode([3, 421, 420]) == "<x>"
    assert tokenizer.special_tokens["image_token"] == "<img>"
    plain = tokenizer.encode("<made><img>", add_special_tokens=False, parse_special=False)
    assert not tokenizer.special_ids.intersection(plain)


def test_special_tokens_that_sentencepiece_finds_by_itself(tmp_path: Path) -> None:
    """Gemma's marks of turns are such pieces: text from outside must not make them."""
    make_sentencepiece(tmp_path, user_defined_symbols=["<turn>", "<tab>"])
    config = {"added_tokens_decoder": {"3": token("<turn>", special=True)}}
    write(tmp_path, tokenizer_config__json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<turn>a<tab>", add_special_tokens=False)[0::2] == [3, 4]
    plain = tokenizer.encode("<turn>a<tab>", add_special_tokens=False, parse_special=False)
    assert 3 not in plain
    assert 4 in plain
    assert tokenizer.decode(plain) == "<turn>a<tab>"
    guarded = tokenizer.encode_guarded(f"<turn>{tokenizer.guard('<turn>')}")
    assert guarded.count(3) == 1


def test_ordinary_pieces_named_as_special_tokens(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path)
    write(tmp_path, tokenizer_config__json={"bos_token": "\u2581the", "pad_token": "<0xE2>"})
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("\u2581the<0xE2>", add_special_tokens=False)
    assert ids == [tokenizer.bos_id, 3 + 0xE2]
    assert tokenizer.special_ids == {0, 1, 2, *ids}
    assert tokenizer.encode_guarded("\u2581the<0xE2>") == ids
    assert tokenizer.decode(ids) == ""


def test_templates_in_other_files(tmp_path: Path) -> None:
    write(make_bytes(tmp_path), tokenizer_config__json={"chat_template": "A"})
    write(tmp_path, chat_template__json={"chat_template": {"default": "B", "tool_use": "C"}})
    assert load_tokenizer(tmp_path).chat_templates == {"default": "B", "tool_use": "C"}
    write(tmp_path, chat_template__jinja="D")
    assert load_tokenizer(tmp_path).chat_templates == {"default": "D"}


@contextmanager
def soon() -> Iterator[None]:
    """It takes less than 2 s of this thread."""
    start_s = time.thread_time()
    yield
    assert time.thread_time() - start_s < 2.0


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
NAMELESS = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": []}}, "EmptyVocabulary"),
    "no such token": ({"model": {**MODEL, "merges": ["a z"]}}, "`z` out of vocabulary"),
    "no such affix": ({"post_processor": {**TEMPLATE, "single": NAMELESS}}, "no entry found"),
    "no such map": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "precompiled_charsmap",
    ),
    "no regex": ({"pre_tokenizer": regex("((((")}, "parenthesis"),
    "a huge token": ({"added_tokens": [special("x" * 100_000)]}, "too many or too long"),
    "many tokens": (
        {"added_tokens": [special(f"{i:0500}", 3 + i) for i in range(100)]},
        "too many or too long",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer_json(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    write(tmp_path, tokenizer__json={**TOKENIZER, **change})
    with soon(), pytest.raises(ModelLoadError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pre_tokenizer": regex("(a+)+$")}, "a" * 40 + "b"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, "zz"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}}, "zz"),
    ],
)
def test_a_text_that_cannot_be_encoded(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    """Where the library gives up inside, too: that is not even an Exception."""
    write(tmp_path, tokenizer__json={**TOKENIZER, **change})
    tokenizer = load_tokenizer(tmp_path)
    for encode in (tokenizer.encode, tokenizer.encode_guarded):
        with soon(), pytest.raises(InvalidField, match="cannot encode the text"):
            encode(text)


CONFIG = {"tokenizer_config__json": {}}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "deep": ({"tokenizer_config__json": "[" * 100_000}, "not valid JSON"),
    "deep objects": ({"special_tokens_map__json": '{"a":' * 100_000}, "not valid JSON"),
    "flag": ({"tokenizer_config__json": {"add_bos_token": "yes"}}, "`add_bos_token`"),
    "template": ({"tokenizer_config__json": {"chat_template": 5}}, "`chat_template`"),
    "list": ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
    "huge id": (
        {"tokenizer_config__json": {"added_tokens_decoder": {"9" * 9: token("x")}}},
        "999999999 is not between",
    ),
    "negative id": ({"added_tokens__json": {"x": -1}}, "-1 is not between"),
    "id of letters": ({"added_tokens__json": {"x": "y"}}, "no number"),
    "long token": ({"added_tokens__json": {"x" * 9999: 5}}, "`9999` characters"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_broken_settings(tmp_path: Path, name: str) -> None:
    files, message = SETTINGS[name]
    write(tmp_path, tokenizer__json=TOKENIZER, **files)
    with soon(), pytest.raises(ModelLoadError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab__json": VOCABULARY}, "merges.txt"),
        ({"vocab__json": "{", "merges__txt": ""}, "not valid JSON"),
        ({"vocab__json": {"a": 0}, "merges__txt": ""}, "`255` of `256` bytes"),
        ({"vocab__json": {**LETTERS, "x": "y"}, "merges__txt": ""}, "no number"),
        ({"vocab__json": {**LETTERS, "x": -5}, "merges__txt": ""}, "vocab.json"),
        ({"vocab__json": LETTERS, "merges__txt": "h e x\n"}, "vocab.json"),
        ({"vocab__json": LETTERS, "merges__txt": "h e\n"}, "vocab.json"),
    ],
)
def test_broken_vocabularies(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with soon(), pytest.raises(ModelLoadError, match=message):
        load_tokenizer(write(tmp_path, **files))


def test_a_vocabulary_of_another_class_is_refused(tmp_path: Path) -> None:
    config = {"tokenizer_class": "CLIPTokenizer"}
    write(tmp_path, vocab__json=VOCABULARY, merges__txt="", tokenizer_config__json=config)
    with pytest.raises(UnsupportedModel, match="CLIPTokenizer"):
        load_tokenizer(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_FILE_BYTES", 100)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "added_tokens.json"):
        path = tmp_path / name
        path.mkdir()
        (path / "tokenizer.json").write_text("{}")
        (path / name).write_text("x" * 101)
        with pytest.raises(ModelLoadError, match="more than the `100`"):
            load_tokenizer(path / name if name == "tokenizer.model" else path)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_damaged_files_give_an_error_or_a_tokenizer(tmp_path: Path, kind: str) -> None:
    (make_bytes if kind == "tokenizer.json" else make_sentencepiece)(tmp_path)
    whole = (tmp_path / kind).read_bytes()
    rng = random.Random(7)
    num_errors = 0
    for turn in range(150):
        data = bytearray(whole[: rng.randrange(len(whole))] if turn % 3 == 0 else whole)
        for _ in range(rng.randrange(1, 12) if turn % 3 else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / kind).write_bytes(data)
        try:
            with soon():
                tokenizer = load_tokenizer(tmp_path)
                tokenizer.decode(tokenizer.encode("the <s> 日本 \x00\n"))
        except PenstockError:
            num_errors += 1
    assert num_errors > 60


def chain(piece: str) -> str:
    """As many pieces as a source may hold."""
    return "".join(piece.replace("#", str(i)) for i in range(250_000 // (len(piece) + 4)))


@pytest.mark.parametrize(
    "source",
    [
        chain("{{a#}}"),
        "{% if a %}" + chain("{% elif a# %}") + "{% endif %}",
        "{{" + chain("a#~") + "a}}",
        chain("{% macro m#() %}{% endmacro %}"),
        "{% for x in y %}" + chain("{% if x %}{% set a# = 1 %}{% endif %}") + "{% endfor %}",
        "{{[" + chain("1,") + "]}}",
    ],
)
def test_sources_that_take_long_to_compile(source: str) -> None:
    assert len(source) <= 256_000
    with soon(), pytest.raises(ModelLoadError, match="words and signs"):
        ChatTemplate(source)


def test_sources_by_name_count_together() -> None:
    ChatTemplate({"default": "{{ a }}" * 2000, "tool_use": "{{ a }}" * 1000})
    with pytest.raises(ModelLoadError, match="tool_use"):
        ChatTemplate({"default": "{{ a }}" * 2000, "tool_use": "{{ a }}" * 3000})


def test_a_template_ends_in_time() -> None:
    assert MAX_S < 2.0
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with soon(), pytest.raises(InvalidField, match="it ran for more than"):
        ChatTemplate(endless).render([])

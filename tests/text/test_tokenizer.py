from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.text.tokenizer import Tokenizer, load_tokenizer

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)
SENTINEL = "\U000e01ef"
id_lists = st.lists(st.integers(0, 2**32), max_size=30)
TEXTS = [
    "",
    " ",
    "hello",
    " hello  world\n\n",
    "naïve café, 日本語 и 😀\t\x00\x7f",
    "<|end|>hi<|user|> there<s></s><|endoftext|>[INST] x [/INST]<unk>",
]


@cache
def library(path: Path) -> Library:
    return Library.from_file(str(path / "tokenizer.json"))


def raw_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@cache
def sentencepiece_model(file: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_encodes_as_the_library(byte_level, text: str) -> None:
    expected = library(byte_level.path)
    for special in (True, False):
        ids = byte_level.tokenizer.encode(text, add_special_tokens=special)
        assert ids == expected.encode(text, add_special_tokens=special).ids


@given(ids=id_lists, skip=st.booleans())
def test_byte_level_decodes_any_ids_as_the_library(byte_level, ids: list[int], skip: bool) -> None:
    tokenizer = byte_level.tokenizer
    ids = [i % (tokenizer.vocab_size + 3) for i in ids]  # a few are out of the vocabulary
    garbled = {tokenizer.token_id("<é>")}  # by the library, see HuggingFaceBackend.piece_bytes
    ids = [i for i in ids if i not in garbled]
    expected = library(byte_level.path).decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(text=texts)
def test_byte_level_gives_every_text_back(byte_level, text: str) -> None:
    tokenizer = byte_level.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    form = unicodedata.normalize("NFC", text) if byte_level.name == "pythia" else text
    assert tokenizer.decode(ids) == form


def test_added_tokens_decode_to_themselves(tiny: Tokenizer) -> None:
    assert tiny.decode(tiny.encode("a<é>b<think>")) == "a<é>b<think>"


@given(text=texts)
def test_spaced_gives_every_text_back(spaced, text: str) -> None:
    ids = spaced.tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert spaced.tokenizer.decode(ids) == text
    lead = " " if ids else ""
    assert raw_text(spaced.tokenizer, ids) == lead + text


@given(text=texts)
def test_spaced_agrees_with_its_library(spaced, text: str) -> None:
    ids = spaced.tokenizer.encode(text, add_special_tokens=False)
    if spaced.path.is_dir() and (spaced.path / "tokenizer.json").is_file():
        expected = library(spaced.path)
        assert ids == expected.encode(text, add_special_tokens=False).ids
        assert spaced.tokenizer.decode(ids) == expected.decode(ids)
    else:
        file = spaced.path / "tokenizer.model" if spaced.path.is_dir() else spaced.path
        model = sentencepiece_model(file)
        if not any(model.id_to_piece(i) in text for i in range(3)):
            assert ids == model.encode(text)
            assert spaced.tokenizer.decode(ids) == model.decode(ids)


@given(parts=st.lists(st.one_of(texts, st.sampled_from(["<", "|", ">", "</s>"])), max_size=4))
@settings(max_examples=50)
def test_unparsed_text_holds_no_special_id(loaded, parts: list[str]) -> None:
    tokenizer = loaded.tokenizer
    specials = [tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)[:8]]
    text = "".join(a + b for a, b in zip([*parts, ""], specials, strict=False))
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert not tokenizer.special_ids.intersection(ids)
    form = unicodedata.normalize("NFC", text) if loaded.name == "pythia" else text
    assert tokenizer.decode(ids) == form
    assert tokenizer.special_ids.intersection(tokenizer.encode(text, add_special_tokens=False))


def test_affixes_are_added_on_request(tmp_path_factory, loaded) -> None:
    tokenizer = loaded.tokenizer
    bare = tokenizer.encode("hi", add_special_tokens=False)
    prefix = [tokenizer.bos_id] if loaded.name.startswith(("mistral", "tiny-sent")) else []
    for parse_special in (True, False):
        assert tokenizer.encode("hi", parse_special=parse_special) == prefix + bare


@given(text=st.lists(st.sampled_from([*"<|>ends/", "<|user|>", "<|end|>", "<s>"])).map("".join))
def test_guarded_text_is_mere_text(loaded, text: str) -> None:
    """Also where the special token only arises between two guarded texts."""
    tokenizer = loaded.tokenizer
    special = tokenizer.token_text(max(tokenizer.special_ids))
    halves = (special[:2], special[2:], special, special[:-1], special[-1], text)
    rendered = special + "".join(map(tokenizer.guard, halves)) + special
    ids = tokenizer.encode_guarded(rendered)
    assert [i for i in ids if i in tokenizer.special_ids] == [max(tokenizer.special_ids)] * 2
    assert raw_text(tokenizer, ids[1:-1]).removeprefix(" ") == "".join(halves)


@given(text=texts)
def test_guard_leaves_other_text_alone(loaded, text: str) -> None:
    tokenizer = loaded.tokenizer
    text = text.replace(SENTINEL, "")
    specials = {tokenizer.token_text(i) for i in tokenizer.special_ids}
    if set("".join(specials)).isdisjoint(text):
        assert tokenizer.guard(text) == text
    assert tokenizer.guard(f"{SENTINEL} Q") == "\ufffd Q"
    assert tokenizer.encode_guarded(text) == tokenizer.encode(text, add_special_tokens=False)


def make_letters(path: Path, token: AddedToken, **parts: Any) -> Tokenizer:
    """A tokenizer whose tokens are letters and one special token."""
    letters = "▁ \n<|>ABMSEN_abdeimns＜＞｜"
    library = Library(models.BPE({char: i for i, char in enumerate(letters)}, []))
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    for name, part in parts.items():
        setattr(library, name, part)
    library.add_special_tokens([token])
    library.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("normalizer", "text"),
    [(normalizers.NFKC(), "＜|im_end|＞"), (normalizers.Lowercase(), "<|IM_END|>")],
)
def test_a_normalizer_makes_no_special_token(
    tmp_path: Path, normalizer: normalizers.Normalizer, text: str, normalized: bool
) -> None:
    token = AddedToken("<|im_end|>", special=True, normalized=normalized)
    tokenizer = make_letters(tmp_path, token, normalizer=normalizer)
    (special,) = tokenizer.special_ids
    for written in (text, text + "<", "<|im_end|>"):
        plain = tokenizer.encode(written, add_special_tokens=False, parse_special=False)
        assert plain
        assert special not in plain
        rendered = f"a<|im_end|>{tokenizer.guard(written)}<|im_end|>"
        ids = tokenizer.encode_guarded(rendered)
        assert [i for i, token_id in enumerate(ids) if token_id == special] == [1, len(ids) - 1]


@pytest.mark.parametrize("text", ["ab", "ab<", "<s", "s>", "s", " <s> ", "a <s>"])
@pytest.mark.parametrize("strip", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}])
def test_a_guard_changes_no_other_token(tmp_path: Path, strip: dict[str, bool], text: str) -> None:
    """What a token begins, or swallows around it, is as in a text without a guard."""
    first = pre_tokenizers.Metaspace(prepend_scheme="first")
    token = AddedToken("<s>", special=True, **{"normalized": False, **strip})
    tokenizer = make_letters(tmp_path, token, pre_tokenizer=first)
    (special,) = tokenizer.special_ids
    ids = tokenizer.encode_guarded(f"a \n<s>\n {tokenizer.guard(text)} <s>\n")
    neutral = f"a \n<s>\n {text.replace('s', 'b')} <s>\n"
    same = {tokenizer.token_id("s"): tokenizer.token_id("b")}
    assert ids.count(special) == 2
    expected = tokenizer.encode(neutral, add_special_tokens=False)
    assert [same.get(i, i) for i in ids] == expected


def test_surrogates_are_no_error(loaded) -> None:
    tokenizer = loaded.tokenizer
    assert tokenizer.encode("a\ud83d\ude00b") == tokenizer.encode("a\U0001f600b")
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_names_of_special_tokens(tiny: Tokenizer, tiny_llama: Tokenizer) -> None:
    assert tiny.bos_id == 3
    assert tiny.special_tokens == {"bos_token": "<s>", "eos_token": "<|end|>"}
    assert tiny.special_ids == {0, 1, 2, 3}
    assert tiny.chat_templates == {"default": "{{ 1 }}"}
    assert tiny.token_str(tiny.encode(" the")[0]) == "Ġthe"
    assert tiny.token_str(10**9) is None
    assert tiny.token_bytes(10**9) == b""
    assert tiny.token_id("<think>") not in tiny.special_ids
    assert tiny_llama.token_text(tiny_llama.token_id("▁") or 0) == " "
    assert tiny_llama.token_bytes(tiny_llama.token_id("<0xE2>") or 0) == b"\xe2"


def test_sentencepiece_reads_its_configuration(spaced) -> None:
    if spaced.name != "tiny-sentencepiece":
        return
    tokenizer = spaced.tokenizer
    assert tokenizer.vocab_size == 422
    assert tokenizer.special_ids == {0, 1, 2, 420}
    assert tokenizer.encode("<|user|><think>", add_special_tokens=False) == [420, 421]
    assert tokenizer.encode("<think>", add_special_tokens=False, parse_special=False) == [421]
    assert tokenizer.bos_id == 1
    assert tokenizer.special_tokens["eos_token"] == "</s>"
    assert "pad_token" not in tokenizer.special_tokens
    assert tokenizer.decode([1, 420, 421]) == "<think>"


def test_newest_model_file_is_taken(data_dir: Path) -> None:
    assert load_tokenizer(data_dir / "tokenizer-mistral" / "data").vocab_size == 32768


def test_chat_templates_are_found(tmp_path: Path, byte_level) -> None:
    if byte_level.name != "tiny-bytes":
        return
    shutil.copy(byte_level.path / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D")
    templates = load_tokenizer(tmp_path / "tokenizer.json").chat_templates
    assert templates == {"default": "C", "rag": "D"}
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(ModelLoadError, match="chat_template"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json"),
        ({"tokenizer.model": ""}, "SentencePiece"),
        ({"tokenizer.model": "garbage"}, "SentencePiece"),
        ({"tokenizer.model": "x", "tokenizer_config.json": "[]"}, "no JSON object"),
        ({"tokenizer.model": "x", "special_tokens_map.json": "{"}, "not valid JSON"),
        ({"tokenizer.model": "x", "tokenizer_config.json": "\xff"}, "not valid JSON"),
        (
            {"tokenizer.model": "", "tokenizer_config.json": '{"added_tokens_decoder": {"x": 1}}'},
            "added_tokens_decoder",
        ),
    ],
)
def test_broken_directories(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(tmp_path)


def test_unknown_decoder_is_refused(tmp_path: Path, byte_level) -> None:
    if byte_level.name != "tiny-bytes":
        return
    content = json.loads((byte_level.path / "tokenizer.json").read_text())
    ctc = {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}
    for decoder in (None, ctc):
        content["decoder"] = decoder
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UnsupportedModel, match="decoder"):
            load_tokenizer(tmp_path)


def test_loading_imports_no_model_library(byte_level) -> None:
    if byte_level.name != "tiny-bytes":
        return
    code = (
        "import sys; from penstock.text.tokenizer import load_tokenizer;"
        f"load_tokenizer({str(byte_level.path)!r}).encode('hi');"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Tokenizers out of GGUF files: the ids, and the text of ids, are those of the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tests.text.conftest import load
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

import gguf
from penstock.errors import ModelLoadError, PenstockError, UnsupportedModel
from penstock.text import gguf_pretokenizers
from penstock.text.gguf_pretokenizers import RULES
from penstock.text.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock; WE'LL see.",
    "  two  spaces\tand\ttabs \n\n and lines\r\n\r\n",
    "naïve café — déjà vu: e\u0301 and é",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם مرحبا بالعالم",
    "日本語のテキスト、中文文本和한국어 텍스트",
    "नमस्ते दुनिया สวัสดีชาวโลก កាន់តែពិសេស",
    "😀👩‍👩‍👧‍👦 🇺🇦 \u200d\ufeff x² ½ Ⅷ",
    "def f(x):\n    return x**2  # 3.14159 != 2.71828\n\t\tpass",
    "<|endoftext|>after</s>[INST] a [/INST]<s>",
    "\x00\x01\x7f \u2028 ▁ ▁▁ a▁b <0x0A>",
    "3 33 333 3333 33333 333333 3.3 3..3 --==--''''''```",
]


def write(
    path: Path, keys: dict[str, Any], name: str = "a.gguf", architecture: str = "llama"
) -> Path:
    """A GGUF file of metadata alone."""
    writer = gguf.GGUFWriter(path / name, architecture)
    kinds: dict[type, Callable[..., None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        kinds[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path / name


def byte_level_keys(file: Path, pre: str) -> dict[str, Any]:
    """A byte-level `tokenizer.json` as llama.cpp's converter writes it."""
    content = json.loads(file.read_text("utf-8"))
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    by_id |= {token_id: token["content"] for token_id, token in added.items()}
    tokens, types = [], []
    for token_id in range(max(by_id) + 5):  # with rows that are no tokens
        tokens.append(by_id.get(token_id, f"[PAD{token_id}]"))
        kind = CONTROL if added.get(token_id, {}).get("special") else USER_DEFINED
        types.append(UNUSED if token_id not in by_id else kind if token_id in added else NORMAL)
    merges = content["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
    }


def sentencepiece_keys(file: Path) -> dict[str, Any]:
    """A SentencePiece model as llama.cpp's converter writes it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokens, scores, types = [], [], []
    for token_id in range(model.vocab_size()):
        tokens.append(model.id_to_piece(token_id))
        scores.append(model.get_score(token_id))
        kind = BYTE if model.is_byte(token_id) else NORMAL
        kind = UNKNOWN if model.is_unknown(token_id) else kind
        types.append(CONTROL if model.is_control(token_id) else kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*tokens, "[PAD]"],
        "tokenizer.ggml.scores": [*scores, -1000.0],
        "tokenizer.ggml.token_type": [*types, UNUSED],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def assert_same(ours: Tokenizer, theirs: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        for flags in ({}, {"add_special_tokens": False}, {"parse_special": False}):
            ids = theirs.encode(text, **flags)
            assert ours.encode(text, **flags) == ids, (text, flags)
            for skips in (True, False):
                decoded = theirs.decode(ids, skip_special_tokens=skips)
                assert ours.decode(ids, skip_special_tokens=skips) == decoded
            assert [ours.token_str(i) for i in ids] == [theirs.token_str(i) for i in ids]


@pytest.mark.parametrize(
    ("name", "pre"), [("tiny-bytes", "gpt-2"), ("gpt2", "gpt-2"), ("pythia", "mpt")]
)
def test_byte_level(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str, pre: str
) -> None:
    original = load(name, tmp_path_factory)
    keys = byte_level_keys(original.path / "tokenizer.json", pre)
    ours = load_tokenizer(write(tmp_path, keys))
    library = Library.from_file(str(original.path / "tokenizer.json"))
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == original.tokenizer.decode(ids)
    assert_same(ours, original.tokenizer, TEXTS)
    assert ours.token_str(len(keys["tokenizer.ggml.tokens"]) - 1) is None  # a row that is no token


def test_brook(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its words are cut by no rule that has a name; the file may hold the whole original."""
    original = load("brook", tmp_path_factory)
    file = original.path / "tokenizer.json"
    keys = byte_level_keys(file, "brook")
    with pytest.raises(UnsupportedModel, match="is `brook` in"):
        load_tokenizer(write(tmp_path, keys))
    keys["tokenizer.huggingface.json"] = file.read_text("utf-8")
    assert_same(load_tokenizer(write(tmp_path, keys)), original.tokenizer, TEXTS)


@pytest.mark.parametrize("name", ["tiny-sentencepiece", "mistral-v1", "mistral-v3"])
def test_sentencepiece(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    original = load(name, tmp_path_factory)
    file = original.path
    if file.is_dir():
        file = file / "tokenizer.model"
        theirs = load_tokenizer(write_alone(tmp_path, file))
    else:
        theirs = original.tokenizer
    ours = load_tokenizer(write(tmp_path, sentencepiece_keys(file)))
    assert_same(ours, theirs, TEXTS)
    assert (ours.bos_id, ours.special_ids) == (theirs.bos_id, theirs.special_ids)
    assert ours.special_tokens == theirs.special_tokens
    assert ours.drops_leading_space == theirs.drops_leading_space


def write_alone(directory: Path, file: Path) -> Path:
    """A copy of a SentencePiece model without the configuration beside it."""
    found = directory / "alone" / "tokenizer.model"
    found.parent.mkdir()
    found.write_bytes(file.read_bytes())
    return found


def test_added_tokens_of_sentencepiece(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original = load("tiny-sentencepiece", tmp_path_factory)
    keys = sentencepiece_keys(original.path / "tokenizer.model")
    for text, kind in (("<|user|>", CONTROL), ("<think>", USER_DEFINED)):
        keys["tokenizer.ggml.tokens"].insert(-1, text)
        keys["tokenizer.ggml.scores"].insert(-1, -1000.0)
        keys["tokenizer.ggml.token_type"].insert(-1, kind)
    ours = load_tokenizer(write(tmp_path, keys))
    texts = [*TEXTS, "a <|user|> b", "<think>hello</think> the<think>the", " <think> "]
    assert_same(ours, original.tokenizer, texts)


def test_odd_types_of_sentencepiece(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Converters have marked padding as unknown, and the ends as anything."""
    original = load("mistral-v1", tmp_path_factory)
    keys = sentencepiece_keys(original.path)
    types = keys["tokenizer.ggml.token_type"]
    types[0], types[1], types[2] = CONTROL, USER_DEFINED, NORMAL
    for number in range(3):
        keys["tokenizer.ggml.tokens"].append(f"[PAD{number}]")
        keys["tokenizer.ggml.scores"].append(-10000.0)
        types.append(UNKNOWN)
    ours = load_tokenizer(write(tmp_path, keys))
    assert_same(ours, original.tokenizer, TEXTS)
    assert ours.special_ids == original.tokenizer.special_ids


@pytest.mark.parametrize("adds", [True, False])
def test_no_space_in_front(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, adds: bool
) -> None:
    original = load("tiny-sentencepiece", tmp_path_factory)
    keys = sentencepiece_keys(original.path / "tokenizer.model")
    keys["tokenizer.ggml.add_space_prefix"] = adds
    ours = load_tokenizer(write(tmp_path, keys))
    assert ours.token_str(ours.encode("the", add_special_tokens=False)[0]).startswith("▁") == adds
    assert ours.decode(ours.encode("the dog")) == "the dog"


@pytest.mark.parametrize(
    ("flags", "around"),
    [
        ({}, (True, False)),
        ({"add_bos_token": False}, (False, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
@pytest.mark.parametrize("name", ["tiny-bytes", "tiny-sentencepiece"])
def test_what_stands_around(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    flags: dict[str, bool],
    around: tuple[bool, bool],
) -> None:
    original = load(name, tmp_path_factory)
    if name == "tiny-bytes":
        keys = byte_level_keys(original.path / "tokenizer.json", "llama-bpe")
        keys |= {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 0}
    else:
        keys = sentencepiece_keys(original.path / "tokenizer.model")
    keys |= {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    ours = load_tokenizer(write(tmp_path, keys))
    bare = ours.encode("hello", add_special_tokens=False)
    first, last = keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]
    wanted = [first] * around[0] + bare + [last] * around[1]
    assert ours.encode("hello") == wanted


def word_pieces() -> Library:
    """A small BERT tokenizer."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world the dog ##s ##ing go run ##ning , . ! cafe"
    library = Library(
        models.WordPiece({word: i for i, word in enumerate(words.split())}, unk_token="[UNK]")
    )
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    library.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    library.add_tokens([AddedToken("<url>", normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return library


def test_word_piece(tmp_path: Path) -> None:
    library = word_pieces()
    tokens = [library.id_to_token(i) for i in range(library.get_vocab_size())]
    types = [CONTROL if token.startswith("[") else NORMAL for token in tokens[:-1]]
    types.append(USER_DEFINED)
    phantom = [
        token if kind == CONTROL else token[2:] if token.startswith("##") else f"▁{token}"
        for token, kind in zip(tokens, types, strict=True)
    ]
    keys = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.tokens": phantom,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    ours = load_tokenizer(write(tmp_path, keys))
    library.save(str(tmp_path / "tokenizer.json"))
    original = load_tokenizer(tmp_path / "tokenizer.json")
    texts = [*TEXTS, "Hello dogs, going running!", "the [MASK] dog. Café", "go <url> go<url>!"]
    assert_same(ours, original, texts)
    for text in texts:
        ids = library.encode(text).ids
        assert ours.encode(text) == ids
        bare = [i for i in ids if 4 < i < len(tokens) - 1]
        assert ours.decode(bare) == library.decode(bare)
    assert ours.special_tokens["cls_token"] == "[CLS]"


def cut(name: str, text: str) -> list[str]:
    """The pieces that a rule cuts a text into."""
    rule = RULES[name].pre_tokenizer(add_prefix_space=False)
    return [text[first:last] for _, (first, last) in rule.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it'll 12!!  x\n\ny", ["it", "'ll", " 12", "!!", " ", " x", "\n", "\n", "y"]),
        ("llama-bpe", "I'LL 12345!!\n\ny", ["I", "'LL", " ", "123", "45", "!!\n\n", "y"]),
        ("dbrx", "I'LL 12345!!\n\ny", ["I", "'LL", " ", "123", "45", "!!\n\n", "y"]),
        ("qwen2", "I'll 123 (a)\r\n b", ["I", "'ll", " ", "1", "2", "3", " (", "a", ")\r\n", " b"]),
        ("tekken", "HelloWorld iOS 12/\n", ["Hello", "World", " i", "OS", " ", "1", "2", "/\n"]),
        ("gpt-4o", "HelloWorld's 1234/\nA", ["Hello", "World's", " ", "123", "4", "/\n", "A"]),
        ("smollm", "a 12 b", ["a", " ", "1", "2", " b"]),
        ("starcoder", "x=10", ["x", "=", "1", "0"]),
        ("refact", "x=10", ["x", "=", "1", "0"]),
        ("command-r", "in 2024", ["in", " ", "2", "0", "2", "4"]),
        ("falcon", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("deepseek-llm", "ab 你好12,c\nd", ["ab", " ", "你好", "1", "2", ",", "c", "\n", "d"]),
        ("deepseek-coder", "ab 12(c)", ["ab", " ", "1", "2", "(", "c", ")"]),
        ("deepseek-v3", "ab 12345你好 _x!", ["ab", " ", "123", "45", "你好", " _", "x", "!"]),
    ],
)  # fmt: skip
def test_cuts(name: str, text: str, pieces: list[str]) -> None:
    """Known answers, by hand from the published patterns."""
    assert cut(name, text) == pieces


@pytest.mark.parametrize("name", RULES)
def test_cuts_lose_nothing(name: str) -> None:
    for text in TEXTS:
        assert "".join(cut(name, text)) == text


def test_cased_letters() -> None:
    """The class is what DeepSeek lists: 2,729 letters, all with a case."""
    text = gguf_pretokenizers._CASED
    found: set[str] = set()
    for index, char in enumerate(text):
        if char == "-":
            found |= set(map(chr, range(ord(text[index - 1]), ord(text[index + 1]) + 1)))
        else:
            found.add(char)
    assert len(found) == 2729
    assert all(char.isalpha() for char in found)
    assert "ƻ" not in found
    assert "𝐀" not in found


def test_chat_templates(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    original = load("tiny-bytes", tmp_path_factory)
    keys = byte_level_keys(original.path / "tokenizer.json", "gpt-2")
    keys |= {
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools }}",
    }
    tokenizer = load_tokenizer(write(tmp_path, keys))
    assert tokenizer.chat_templates == {
        "default": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tool_use": "{{ tools }}",
    }
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|end|>"}
    assert tokenizer.encode_guarded("<s>hi<|end|>")[0] == 3


def tiny_keys() -> dict[str, Any]:
    """A tokenizer of all bytes and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "<s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * 257 + [CONTROL],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": None}, "`tokenizer.ggml.model` is missing"),
        ({"model": "rwkv"}, "`tokenizer.ggml.model` is `rwkv`"),
        ({"pre": None}, "`tokenizer.ggml.pre` is `default`"),
        ({"pre": "new"}, "`tokenizer.ggml.pre` is `new`"),
        ({"tokens": None}, "`tokenizer.ggml.tokens` is missing"),
        ({"tokens": "x"}, "`tokenizer.ggml.tokens` is `x`"),
        ({"token_type": [1, 2]}, "`tokenizer.ggml.token_type` has `2` entries"),
        ({"merges": None}, "`tokenizer.ggml.merges` is missing"),
        ({"merges": ["ab"]}, "has `ab`, which is no pair"),
        ({"merges": ["a b c"]}, "has `a b c`, which is no pair"),
        ({"merges": ["a zz"]}, "is no tokenizer file"),
        ({"bos_token_id": 258}, "below the number of tokens, `258`"),
        ({"bos_token_id": "x"}, "`tokenizer.ggml.bos_token_id` is `x`"),
        ({"add_bos_token": 1}, "`tokenizer.ggml.add_bos_token` is `1`"),
        ({"model": "llama"}, "`tokenizer.ggml.scores` is missing"),
        ({"model": "llama", "scores": [0.5]}, "`tokenizer.ggml.scores` has `1` entries"),
        ({"model": "llama", "scores": [0.5] * 258}, "are all the same"),
        ({"model": "llama", "scores": [0.5, *[1.5] * 257]}, "is no SentencePiece model"),
    ],
)
def test_wrong_metadata(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    keys = tiny_keys()
    for key, value in change.items():
        keys.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            keys[f"tokenizer.ggml.{key}"] = value
    file = write(tmp_path, keys)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load_tokenizer(file)
    assert str(file) in caught.value.message


@pytest.mark.parametrize(("architecture", "is_known"), [("gpt2", True), ("qwen2", False)])
def test_files_that_do_not_tell(tmp_path: Path, architecture: str, is_known: bool) -> None:
    keys = tiny_keys()
    del keys["tokenizer.ggml.pre"]
    file = write(tmp_path, keys, architecture=architecture)
    if is_known:
        assert load_tokenizer(file).encode("ab") == [256]
    else:
        with pytest.raises(UnsupportedModel, match="is `default` in"):
            load_tokenizer(file)


def test_the_tiny_one_is_right(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, tiny_keys()))
    assert tokenizer.encode("abc<s>") == [256, tokenizer.token_id("c"), 257]


def test_tokens_that_are_there_twice(tmp_path: Path) -> None:
    keys = tiny_keys()
    keys["tokenizer.ggml.tokens"] += ["ab"]
    keys["tokenizer.ggml.token_type"] += [NORMAL]
    assert load_tokenizer(write(tmp_path, keys)).encode("ab", add_special_tokens=False) == [256]
    keys["tokenizer.ggml.tokens"] += ["<s>"]
    keys["tokenizer.ggml.token_type"] += [CONTROL]
    keys |= {"tokenizer.ggml.bos_token_id": 259, "tokenizer.ggml.add_bos_token": True}
    assert load_tokenizer(write(tmp_path, keys)).encode("ab") == [259, 256]


@given(data=st.data())
def test_any_byte_changed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever a file says: a tokenizer, or one sentence."""
    directory = tmp_path_factory.getbasetemp()
    content = bytearray(write(directory, tiny_keys(), "fuzz.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (directory / "fuzz.gguf").write_bytes(content)
    try:
        tokenizer = load_tokenizer(directory / "fuzz.gguf")
        tokenizer.decode(tokenizer.encode("a ab 12 <s>"))
    except PenstockError as error:
        str(error).encode()

"""Mistral's tekken.json: the ids of tiktoken, special tokens, and files that are broken."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import ModelLoadError
from penstock.text.tokenizer import load_tokenizer

tiktoken = pytest.importorskip("tiktoken")

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL = 24
TEXT = (
    "the then there  a aa aaa aaaa ab aba abab é à ê 世界 世 \n\n x = (1, 2) /// the theremin\n" * 3
)


def learned(text: bytes, num_merges: int) -> list[bytes]:
    """Tokens by rank: the bytes, then whatever pair is there most often (Sennrich et al. 2016)."""
    tokens = [bytes([byte]) for byte in range(256)]
    parts = [bytes([byte]) for byte in text]
    for _ in range(num_merges):
        pairs = list(pairwise(parts))
        best = max(sorted(set(pairs)), key=pairs.count)
        joined: list[bytes] = []
        for part in parts:
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
    return tokens


TOKENS = [*learned(TEXT.encode(), 60), b" no merge leads here"]


def content(**changes: Any) -> dict[str, Any]:
    """A file; more tokens than are taken, as the published ones have."""
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(TOKENS) + 5,
        "default_vocab_size": len(TOKENS) + NUM_SPECIAL,
        "default_num_special_tokens": NUM_SPECIAL,
        "version": "v3",
    }
    tokens = [*TOKENS, *(b"left out %d" % number for number in range(5))]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    return {"config": config, "vocab": vocab, **changes}


def write(directory: Path, told: Any) -> Path:
    (directory / "tekken.json").write_text(json.dumps(told))
    return directory


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tekken"), content())


ORACLE = tiktoken.Encoding(
    "tekken",
    pat_str=PATTERN,
    mergeable_ranks={token: rank for rank, token in enumerate(TOKENS)},
    special_tokens={},
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.sampled_from("aabhetr  é世\n\t1/()=xTE"), max_size=60) | st.text(max_size=20))
def test_ids_are_those_of_tiktoken(path: Path, text: str) -> None:
    tokenizer = TOKENIZERS.setdefault(path, load_tokenizer(path))
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert ids == [rank + NUM_SPECIAL for rank in ORACLE.encode(text, disallowed_special=())]
    assert tokenizer.decode(ids) == text


TOKENIZERS: dict[Path, Any] = {}


def test_special_tokens(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == len(TOKENS) + NUM_SPECIAL
    assert tokenizer.special_ids == set(range(NUM_SPECIAL))
    assert tokenizer.special_tokens["bos_token"] == "<s>"
    assert tokenizer.bos_id == 1
    the = tokenizer.token_id("the")
    assert tokenizer.encode("the") == [1, the]
    assert tokenizer.encode("[INST]the</s><SPECIAL_20>") == [1, 3, the, 2, 20]
    assert tokenizer.encode("[INST]the</s>", parse_special=False)[1:].count(3) == 0
    assert tokenizer.encode_guarded("<s>[INST]the[/INST]") == [1, 3, the, 4]
    assert tokenizer.decode([1, 3, the]) == "the"


def test_special_tokens_that_the_file_lists(tmp_path: Path) -> None:
    named = ["<unk>", "<s>", "</s>", "[THINK]"]
    listed = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(named)]
    tokenizer = load_tokenizer(write(tmp_path, content(special_tokens=listed)))
    assert tokenizer.encode("[THINK]") == [1, 3]
    assert tokenizer.token_str(4) == "<SPECIAL_4>"
    assert "pad_token" not in tokenizer.special_tokens


def test_it_is_taken_after_the_files_of_others(tmp_path: Path, path: Path) -> None:
    (tmp_path / "tekken.json").write_bytes((path / "tekken.json").read_bytes())
    (tmp_path / "x.model.v3").write_bytes(b"not looked at")
    assert load_tokenizer(tmp_path).vocab_size == len(TOKENS) + NUM_SPECIAL
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def config(**changes: Any) -> dict[str, Any]:
    return content(config=content()["config"] | changes)


def entry(number: int, **changes: Any) -> dict[str, Any]:
    told = content()
    told["vocab"][number] = told["vocab"][number] | changes
    return told


BROKEN: dict[str, tuple[Any, str]] = {
    "a list": ([], "holds no JSON object"),
    "no config": (content(config=None), "no `config` object"),
    "vocab": (content(vocab={"a": 1}), "`vocab` list"),
    "pattern": (config(pattern=None), r"`config\.pattern`"),
    "no regex": (config(pattern="(((("), r"tekken\.json` is no tokenizer file"),
    "no size": (config(default_vocab_size="x"), "default_vocab_size"),
    "huge": (config(default_vocab_size=10**9), "default_vocab_size"),
    "more than there are": (config(default_vocab_size=len(TOKENS) + 999), "default_vocab_size"),
    "fewer than bytes": (config(default_vocab_size=200), "default_vocab_size"),
    "all special": (config(default_num_special_tokens=10**6), "default_vocab_size"),
    "few special": (
        config(default_num_special_tokens=3, default_vocab_size=len(TOKENS) + 3),
        "`special_tokens`",
    ),
    "rank": (entry(5, rank=6), "token of rank `5`"),
    "rank of text": (entry(5, rank="5"), "token of rank `5`"),
    "base64": (entry(7, token_bytes="?"), "token of rank `7`"),
    "number": (entry(7, token_bytes=7), "token of rank `7`"),
    "null": (content(vocab=[None] * 400), "token of rank `0`"),
    "long": (entry(300, token_bytes=base64.b64encode(b"a" * 2000).decode()), "rank `300`"),
    "twice": (entry(300, token_bytes=content()["vocab"][301]["token_bytes"]), "each token once"),
    "bytes": (entry(0, token_bytes=base64.b64encode(b"zz").decode()), "`256` bytes"),
    "special too": (entry(300, token_bytes=base64.b64encode(b"[INST]").decode()), "special token"),
    "special list": (content(special_tokens=7), "`special_tokens`"),
    "special rank": (content(special_tokens=[{"rank": 1, "token_str": "a"}]), "`special_tokens`"),
    "special twice": (
        content(special_tokens=[{"rank": rank, "token_str": "a"} for rank in range(2)]),
        "each once",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path: Path, name: str) -> None:
    told, message = BROKEN[name]
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_tokenizer(write(tmp_path, told))
    assert "tekken.json" in caught.value.message
    assert "\n" not in caught.value.message


def test_damaged(tmp_path: Path, path: Path) -> None:
    """A tokenizer or one sentence, whatever byte is another one."""
    whole = (path / "tekken.json").read_bytes()
    rng = random.Random(3)
    num_errors = 0
    for turn in range(60):
        data = bytearray(whole[: rng.randrange(len(whole))] if turn % 3 == 0 else whole)
        for _ in range(3 if turn % 3 else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "tekken.json").write_bytes(data)
        try:
            load_tokenizer(tmp_path).encode("the then")
        except ModelLoadError:
            num_errors += 1
    assert num_errors > 20

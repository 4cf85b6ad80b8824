"""Texts and pairs as encoders read them: whole and truncated, as transformers' tokenizers do it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.pooling_models import WORDS, bert_tokenizer, causal_tokenizer, roberta_tokenizer

from penstock.errors import InvalidField
from penstock.text.tokenizer import Tokenizer, load_tokenizer

MAKERS = {"bert": bert_tokenizer, "roberta": roberta_tokenizer, "causal": causal_tokenizer}


@pytest.fixture(scope="module", params=MAKERS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    theirs = MAKERS[request.param]()
    theirs.save_pretrained(path)
    return load_tokenizer(path), theirs


def texts(seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randrange(12))) for _ in range(2)]


@pytest.mark.parametrize("seed", range(12))
def test_single_texts(both: tuple[Tokenizer, Any], seed: int) -> None:
    ours, theirs = both
    text = texts(seed)[0] or "a"
    ids, second_start = ours.encode_pair(text)
    assert (ids, second_start) == (theirs(text)["input_ids"], 0)
    assert ids == ours.encode(text)
    for limit in range(3, 14):
        expected = theirs(text, truncation=True, max_length=limit)["input_ids"]
        assert ours.encode_pair(text, max_tokens=limit)[0] == expected


@pytest.mark.parametrize("seed", range(12))
def test_pairs(both: tuple[Tokenizer, Any], seed: int) -> None:
    ours, theirs = both
    first, second = texts(seed)
    first = first or "a"
    for limit in (None, *range(5, 22)):
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        # In lists, because an empty second text alone would count as none.
        expected = theirs([first], [second], return_token_type_ids=True, **cut)
        ids, start = ours.encode_pair(first, second, max_tokens=limit)
        assert ids == expected["input_ids"][0]
        types = expected["token_type_ids"][0]
        assert [int(bool(start) and i >= start) for i in range(len(ids))] == types


def test_no_room_is_told(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    around = len(ours.encode(""))
    with pytest.raises(InvalidField, match="truncate_prompt_tokens"):
        ours.encode_pair("a fox", max_tokens=around)


def test_other_tokenizers_know_no_pairs() -> None:
    class Bytes:
        vocab_size = 258
        special_ids = frozenset({256, 257})
        drops_leading_space = False

        def piece(self, token_id: int) -> str | None:
            return {256: "<s>", 257: "</s>"}.get(token_id)

        def piece_bytes(self, token_id: int) -> bytes:
            return b""

        def piece_id(self, piece: str) -> int | None:
            return {"<s>": 256, "</s>": 257}.get(piece)

        def encode(self, text: str, *, with_affixes: bool) -> list[int]:
            return [256, *text.encode(), 257] if with_affixes else list(text.encode())

        def encode_plain(self, text: str, *, at_start: bool) -> list[int]:
            return list(text.encode())

    tokenizer = Tokenizer(Bytes())
    assert tokenizer.encode_pair("abc") == ([256, 97, 98, 99, 257], 0)
    assert tokenizer.encode_pair("abc", max_tokens=4) == ([256, 97, 98, 257], 0)
    with pytest.raises(InvalidField, match="truncate_prompt_tokens"):
        tokenizer.encode_pair("abc", max_tokens=2)
    with pytest.raises(InvalidField, match="pairs"):
        tokenizer.encode_pair("abc", "d")


def test_lone_surrogates_are_replaced(both: tuple[Tokenizer, Any]) -> None:
    both[0].encode_pair("\ud800 fox", "a \udfff")

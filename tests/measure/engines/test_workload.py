"""Lengths, prompts and the page cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.engines.arms import parse_arm, parse_arms
from penstock.measure.engines.page_cache import evict, files_of, resident_share
from penstock.measure.engines.workload import (
    Length,
    asks,
    parse_lengths,
    takes_token_ids,
    trace_lengths,
    vocab_size,
)


def test_lengths_are_read() -> None:
    assert parse_lengths("512x64, 8x1", "--lengths") == [Length(512, 64), Length(8, 1)]
    for wrong in ("512", "0x5", "5x0", "axb", "", "1x2x3"):
        with pytest.raises(ConfigError, match="`--lengths`"):
            parse_lengths(wrong, "--lengths")


def test_lengths_of_a_trace_are_drawn_and_clipped(tmp_path: Path) -> None:
    trace = tmp_path / "conv.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lengths = [(100, 10), (300, 90), (90, 30), (10, 300), (400, 400)]
    lines += [f"2023-11-16 18:17:0{i}.0000000,{a},{b}" for i, (a, b) in enumerate(lengths)]
    trace.write_text("\n".join(lines) + "\n")
    drawn = trace_lengths(trace, 5, context_len=200, seed=0)
    # The answer keeps its length unless it alone fills half of the context.
    assert sorted(drawn.lengths) == [(10, 190), (90, 30), (100, 10), (100, 100), (110, 90)]
    assert drawn.facts["num_clipped"] == 3
    assert drawn.facts["num_of_trace"] == 5
    assert all(length.num_in + length.num_out <= 200 for length in drawn.lengths)
    again = trace_lengths(trace, 3, context_len=200, seed=0)
    assert again.lengths != trace_lengths(trace, 3, context_len=200, seed=1).lengths
    with pytest.raises(ConfigError, match="fewer than `6`"):
        trace_lengths(trace, 6, context_len=200, seed=0)


def test_the_azure_conversation_trace_is_clipped_to_a_context(data_dir: Path) -> None:
    trace = data_dir / "traces-azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"
    drawn = trace_lengths(trace, 200, context_len=4096, seed=0)
    assert drawn.facts["num_of_trace"] == 19366  # lines of the file but its head
    num_long = sum(num_in + num_out >= 4096 for num_in, num_out in drawn.lengths)
    assert drawn.facts["num_clipped"] <= num_long < 20


def test_prompts_are_exact_in_ids_and_never_the_same() -> None:
    lengths = [Length(7, 3)] * 4
    made = asks(lengths, name="latency 0", seed=1, vocab=50)
    assert all(isinstance(ask.prompt, list) and len(ask.prompt) == 7 for ask in made)
    assert all(token < 50 for ask in made for token in ask.prompt or [])  # type: ignore[operator]
    assert all(ask.max_tokens == 3 and ask.fixed_length for ask in made)
    other = asks(lengths, name="latency 1", seed=1, vocab=50)
    every = [str(ask.prompt) for ask in made + other]
    assert len(set(every)) == 8
    assert made == asks(lengths, name="latency 0", seed=1, vocab=50)
    words = asks(lengths, name="latency 0", seed=1, vocab=None)
    assert all(isinstance(ask.prompt, str) for ask in words)
    chat = asks(lengths, name="latency 0", seed=1, vocab=None, chat=True)
    assert chat[0].prompt is None
    assert chat[0].messages is not None
    assert chat[0].messages[0]["content"] == words[0].prompt


def test_the_vocabulary_is_the_smallest_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 17}')
    assert vocab_size(parse_arms(["vllm:/not/there", "http://host"])) is None
    brook = vocab_size(parse_arms(["inprocess:brook"]))
    assert brook is not None
    assert brook > 17
    assert vocab_size(parse_arms(["brook", f"vllm:{tmp_path}"])) == 17


def test_who_takes_token_ids() -> None:
    taken = [
        takes_token_ids(parse_arm(text))
        for text in ("brook", "inprocess:brook", "transformers:m", "http://host")
    ]
    assert taken == [True, True, False, False]


def test_the_page_cache_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "empty").touch()
    file = tmp_path / "deep" / "weights"
    file.write_bytes(b"x" * 100_000)
    files = files_of(str(tmp_path))
    assert files == [file, tmp_path / "empty"]
    assert files_of(str(file)) == [file]
    assert files_of(str(tmp_path / "none")) == []
    assert resident_share(files) in (None, 1.0)  # it was written a moment ago
    evict(files)  # a memory file system keeps it
    share = resident_share(files)
    assert share is None or 0 <= share <= 1
    assert resident_share([]) is None

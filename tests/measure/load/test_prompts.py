"""Prompts with text: a user's file, and published sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.load import prompts


def written(path: Path, *lines: object) -> Path:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n"
    )
    return path


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = written(
        tmp_path / "p.jsonl",
        {"prompt": "2 + 2 =", "max_tokens": 3, "reference": "4", "stop": "\n"},
        {"id": "chat", "messages": messages, "temperature": 0.7},
        {
            "custom_id": "batch-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "another",
                "messages": messages,
                "max_completion_tokens": 9,
                "top_p": 0.5,
            },
        },
        {"prompt": [1, 2, 3]},
    )
    first, second, third, fourth = prompts.read_jsonl(path)
    assert (first.prompt_id, first.prompt, first.max_tokens) == ("1", "2 + 2 =", 3)
    assert (first.reference, first.stop) == ("4", ["\n"])
    assert (second.prompt_id, second.messages, second.temperature) == ("chat", messages, 0.7)
    assert (third.prompt_id, third.max_tokens, third.extra) == ("batch-1", 9, {"top_p": 0.5})
    assert fourth.prompt == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ({"max_tokens": 3}, "exactly one of `prompt` and `messages`"),
        ({"prompt": "a", "messages": []}, "exactly one"),
        ({"prompt": "a", "max_token": 3}, "max_token"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens"),
        ({"body": 3}, "`body`"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, told: str) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "good"}, line)
    with pytest.raises(ConfigError) as error:
        prompts.read_jsonl(path)
    assert f"`{path}`, line `2`" in error.value.message
    assert told in error.value.message


def test_a_file_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prompt"):
        prompts.read_jsonl(written(tmp_path / "p.jsonl"))
    with pytest.raises(ConfigError, match="cannot be read"):
        prompts.read_jsonl(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "num", "begin"),
    [
        ("mt-bench", 80, "Compose an engaging travel blog post"),
        ("vicuna", 80, "How can I improve my time management"),
        ("spec-bench", 480, "Compose an engaging travel blog post"),
        ("self-instruct", 252, "The sentence you are given might be too wordy"),
        ("gsm8k", 1319, "Janet"),
        ("cnn_dailymail", 200, "Could you please generate a TLDR"),
    ],
)
def test_published_sets(data_dir: Path, name: str, num: int, begin: str) -> None:
    asks = prompts.published(name, data_dir)
    assert len(asks) == num == len({ask.prompt_id for ask in asks})
    assert isinstance(asks[0].prompt, str)
    assert asks[0].prompt.startswith(begin)
    assert all(ask.prompt for ask in asks)


def test_a_set_with_inputs_has_them(data_dir: Path) -> None:
    first = prompts.published("self-instruct", data_dir)[0]
    assert isinstance(first.prompt, str)
    assert "please let me know" in first.prompt
    assert isinstance(first.reference, str)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        prompts.published("gsm8k", tmp_path)
    with pytest.raises(ConfigError, match="no published set"):
        prompts.published("gsm9k", tmp_path)


def test_all_are_used_before_one_is_used_again(tmp_path: Path) -> None:
    asks = prompts.read_jsonl(
        written(tmp_path / "p", *({"prompt": str(number)} for number in range(5)))
    )
    chosen = [ask.prompt for ask in prompts.repeated(asks, 12, seed=3)]
    everything = {str(number) for number in range(5)}
    assert set(chosen[:5]) == everything == set(chosen[5:10])
    assert chosen == [ask.prompt for ask in prompts.repeated(asks, 12, seed=3)]
    assert chosen != [ask.prompt for ask in prompts.repeated(asks, 12, seed=4)]

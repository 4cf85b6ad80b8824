"""Your own task files: easy ones work as they are, wrong ones say line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.measure.load.target import Reply
from penstock.measure.quality import own, suites


def write(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def test_a_text_file_of_three_prompts_is_a_task(tmp_path: Path) -> None:
    task = own.read(write(tmp_path / "three.txt", "One?", "", "Two?\tzwei", "Three?"))
    items = task.items()
    assert task.name == "three"
    assert [item.ask.messages for item in items] == [
        [{"role": "user", "content": text}] for text in ("One?", "Two?", "Three?")
    ]
    assert task.grade(items[0], Reply(text="anything")) == {"score": 1, "non_empty": 1}
    assert task.grade(items[1], Reply(text="zwei")) == {"score": 1, "exact_match": 1}
    assert task.grade(items[1], Reply(text="two"))["score"] == 0


def test_defaults_stand_in_a_first_line_and_a_line_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"name": "mine", "grader": {"kind": "numeric"}, "max_tokens": 7, "system": "Be short."},
        {"id": "a", "prompt": "2+2", "reference": 4, "group": "sums", "stop": ["\n"]},
        {
            "prompt": "2+3",
            "references": [5, "five"],
            "max_tokens": 9,
            "system": "Be long.",
            "seed": 3,
            "temperature": 0.5,
            "category": "sums",
        },
    )
    task = own.read(path)
    first, second = task.items()
    assert (task.name, task.main_score) == ("mine", "numeric")
    assert (first.id, first.group, first.ask.max_tokens, first.ask.stop) == ("a", "sums", 7, ["\n"])
    assert first.ask.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+2"},
    ]
    assert (second.id, second.ask.max_tokens) == ("3", 9)
    assert (second.ask.seed, second.ask.temperature, second.category) == (3, 0.5, "sums")
    assert second.details["references"] == [5, "five"]  # a figure of all answers needs them
    assert second.ask.messages is not None
    assert second.ask.messages[0]["content"] == "Be long."
    assert task.grade(first, Reply(text="It is 4.")) == {"numeric": 1, "answered": 1}


def test_items_with_several_graders_have_one_figure(tmp_path: Path) -> None:
    """A score that only some items have would count the others as wrong."""
    path = write(
        tmp_path / "t.jsonl",
        {"prompt": "a", "reference": "4", "grader": "numeric"},
        {"prompt": "b", "reference": "x", "grader": "contains"},
    )
    task = own.read(path)
    assert task.facts(2).scores.keys() == {"score"}
    assert task.grade(task.items()[0], Reply(text="4")) == {"score": 1, "numeric": 1, "answered": 1}


def test_a_conversation_keeps_its_own_system_message(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "x"}]
    path = write(tmp_path / "t.jsonl", {"system": "All."}, {"messages": turns}, {"prompt": "x"})
    first, second = own.read(path).items()
    assert first.ask.messages == turns
    assert second.ask.messages == [{"role": "system", "content": "All."}, turns[1]]


def test_options_are_defaults_too(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "x", "reference": "B"})
    task = suites.find(str(path), grader="choice", max_tokens=3)
    assert task.main_score == "choice"
    assert task.random_baseline == 0.25
    five = suites.find(str(path), grader='{"kind": "choice", "letters": "ABCDE"}')
    assert five.random_baseline == 0.2
    assert task.items()[0].ask.max_tokens == 3


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "Line `2` .* no JSON"),
        ({"prompt": 3}, r"Line `2` .*prompt"),
        ({"prompt": "x", "refrence": "y"}, "Line `2` .*refrence"),
        ({"prompt": "x", "messages": []}, "Line `2` .*`prompt` and `messages`"),
        ({"prompt": "x", "reference": 1, "references": [1]}, "Line `2` .*`reference`"),
        ({"prompt": "x", "grader": "f1"}, "Line `2` .*`reference` is needed .*`f1`"),
        ({"prompt": "x", "grader": {"kind": "regex"}}, "Line `2` .*pattern"),
        ({"prompt": "x", "id": 1}, "Line `2` .*`id` is `1`"),
        ({"prompt": "x", "name": "n"}, "Line `2` .*`name`"),
        ({"reference": 1}, "Line `2` .*`prompt` and `messages`"),
        ({"messages": []}, "Line `2` .*`messages`"),
        ({"messages": [{"content": "x"}]}, "Line `2` .*`messages` .*`role`"),
        ({"prompt": "x", "max_tokens": 0}, "Line `2` .*max_tokens"),
        ({"prompt": "x", "temperature": -1}, "Line `2` .*temperature"),
        ('{"prompt": "x", "reference": ' + "[" * 100_000, "Line `2` .*no JSON"),
        ({"prompt": "x", "reference": "five", "grader": "numeric"}, "Line `2` .*`five`"),
        ({"prompt": "x", "reference": "E", "grader": "choice"}, "Line `2` .*`E`"),
        ({"prompt": "x", "reference": "AB", "grader": "choice"}, "Line `2` .*`AB`"),
        ({"prompt": "x", "reference": "", "grader": "contains"}, "Line `2` .*blank"),
        ({"prompt": "x", "grader": {"kind": ["f1"]}}, "Line `2` .*grader.kind"),
    ],
)
def test_an_error_names_line_and_field(tmp_path: Path, line: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        own.read(write(tmp_path / "t.jsonl", {"id": 1, "prompt": "fine"}, line))


def test_an_empty_file_and_an_unknown_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prompt"):
        own.read(write(tmp_path / "t.jsonl", {"grader": "f1"}))
    with pytest.raises(ConfigError, match="cannot be read"):
        own.read(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="`judge`"):
        own.read(write(tmp_path / "judge.jsonl", {"prompt": "x"}))
    with pytest.raises(ConfigError, match="nope"):
        suites.find("nope")
    with pytest.raises(ConfigError, match="two tasks"):
        suites.find_all(["brook", "brook"])


def test_the_hash_is_of_what_is_asked_and_graded(tmp_path: Path) -> None:
    def hash_of(**changes: Any) -> str:
        line = {"prompt": "x", "reference": "y", "grader": "contains"} | changes
        return own.read(write(tmp_path / "t.jsonl", line)).data_hash

    assert hash_of() == hash_of()
    changed = [
        hash_of(prompt="z"),
        hash_of(reference="z"),
        hash_of(grader="f1"),
        hash_of(grader={"kind": "contains", "ignore_case": False}),
        hash_of(max_tokens=1),
    ]
    assert len({hash_of(), *changed}) == 6


def test_a_sample_is_drawn_by_the_seed_alone_and_grows(tmp_path: Path) -> None:
    task = own.read(write(tmp_path / "t.txt", *(f"prompt {n}" for n in range(50))))
    ids = [{item.id for item in task.items(n, seed=1)} for n in (5, 10, 50)]
    assert ids[0] < ids[1] < ids[2]
    assert ids[0] == {item.id for item in task.items(5, seed=1)}
    assert ids[0] != {item.id for item in task.items(5, seed=2)}
    assert [int(item.id) for item in task.items(9)] == sorted(int(i.id) for i in task.items(9))


def test_a_mark_of_byte_order_and_line_ends_of_windows_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": "y"}\r\n')
    assert [item.id for item in own.read(path).items()] == ["1", "2"]

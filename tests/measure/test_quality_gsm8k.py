"""GSM8K's scoring on real solutions of models, whose judgement by its authors is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.measure.load.target import Reply
from penstock.measure.quality.gsm8k import Gsm8k, is_correct, last_number, marked_answer
from penstock.measure.quality.jsonl import read_jsonl

MODELS = {
    "6b_finetuning": 286,
    "6b_verification": 515,
    "175b_finetuning": 458,
    "175b_verification": 742,
}


@pytest.mark.parametrize("model", MODELS)
def test_real_solutions_are_judged_as_published(data_dir: Path, model: str) -> None:
    rows = read_jsonl(data_dir / "eval-gsm8k" / "example_model_solutions.jsonl")
    ours = [is_correct(row[model]["solution"], row["ground_truth"]) for row in rows]
    assert ours == [row[model]["is_correct"] for row in rows]
    assert (sum(ours), len(ours)) == (MODELS[model], 1319)


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("so 3\n#### 1,234", "1234", "1234"),
        ("#### $5.", "5", "5"),
        ("#### -3", "-3", "-3"),
        ("A: 18", "18", "18"),
        ("#### 1\n\nQuestion: What next?\n#### 2", "1", "2"),
        ("Option A: 5, so it is 6.", None, "6"),
        ("A: 5 at first.\n#### 6", "6", "6"),
        ("It is 7 apples.", None, "7"),
        ("nothing", None, None),
        ("#### .", "", None),
    ],
)
def test_answers_are_found(text: str, marked: str | None, last: str | None) -> None:
    assert (marked_answer(text), last_number(text)) == (marked, last)
    assert not is_correct(text, "nothing")


def test_the_task_shows_solved_examples_and_grades_both_ways(data_dir: Path) -> None:
    task = Gsm8k(data_dir, num_shots=2)
    item = task.items()[0]
    assert item.ask.messages is not None
    roles = [message["role"] for message in item.ask.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert "####" in item.ask.messages[1]["content"]
    assert not any("<<" in message["content"] for message in item.ask.messages)
    assert task.grade(item, Reply(text="#### 18")) == {"exact_match": 1, "flexible": 1}
    assert task.grade(item, Reply(text="She makes $18.00.")) == {"exact_match": 0, "flexible": 1}
    assert task.grade(item, Reply(text="#### 19")) == {"exact_match": 0, "flexible": 0}
    assert len(task.items()) == 1319

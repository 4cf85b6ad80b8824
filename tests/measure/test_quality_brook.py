"""The suite `brook`: its file is what the generator writes, its rules are the model card's."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(Path(__file__).parent))

from quality_fakes import Sink  # noqa: E402

from brook import suite  # noqa: E402
from brook.example import is_held_out  # noqa: E402
from brook.tasks import TASKS, held_out  # noqa: E402
from penstock.measure.load.target import Reply  # noqa: E402
from penstock.measure.quality.brook import CHECKS, Brook  # noqa: E402
from penstock.measure.quality.runner import run_task  # noqa: E402

DATA = ROOT / "src/penstock/measure/quality/data/brook.jsonl"


@pytest.fixture(scope="module")
def brook() -> Brook:
    return Brook()


def test_the_file_is_what_the_generator_writes(brook: Brook) -> None:
    lines = DATA.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["model_card"] == suite.card_scores()
    for name in ("addition", "lookup_series", "tool_call", "story"):  # all: 3 s
        written = [json.loads(line) for line in lines[1:] if f'"task":"{name}"' in line[:40]]
        assert written == list(suite.items(name))


def test_every_task_of_the_model_is_there_and_held_out(brook: Brook) -> None:
    items = brook.items()
    counts = Counter(item.category for item in items)
    assert counts.keys() == TASKS.keys() - suite.LEFT_OUT
    assert sum(counts.values()) == len({item.id for item in items}) == 4256
    for item in items:
        _, key = item.group.split(":", 1)
        # Some tasks draw on the split of another: a series of lookups on that of `lookup`.
        tasks = {item.category, "lookup", "lookup_missing", "json", "dialogue"}
        assert any(is_held_out(task, key) for task in tasks), item.id


def test_no_question_is_asked_twice(brook: Brook) -> None:
    asked = [json.dumps(item.ask.messages) for item in brook.items()]
    assert len(set(asked)) == len(asked)


def test_a_limit_takes_as_many_of_every_category(brook: Brook) -> None:
    counts = Counter(item.category for item in brook.items(46, seed=3))
    assert set(counts.values()) == {2}
    assert len(counts) == 23
    ids = [{item.id for item in brook.items(46, seed=seed)} for seed in (3, 4)]
    assert len(ids[0] & ids[1]) < 30  # the seed draws them
    assert {item.id for item in brook.items(30, seed=3)} < ids[0]


@pytest.mark.parametrize("name", sorted(TASKS.keys() - suite.LEFT_OUT))
def test_answers_are_judged_as_the_model_card_does(name: str) -> None:
    for example in held_out(name, 5, seed=9):
        ((kind, expected),) = suite.check_of(example).items()
        answer = example.answer_text
        long = answer + "".join(f" Number {n} came." for n in range(70))
        others = (f"{answer}.", answer.rstrip("."), answer.partition(".")[0] + ".", long)
        for text in (
            answer,
            f" {answer}\n",
            f"{answer} x",
            answer[1:],
            "",
            answer.upper(),
            *others,
        ):
            ours = CHECKS[kind](text, expected)
            if kind == "call" and not text.strip().startswith("<|tool_call|>"):
                continue  # a server may hide the token: then it is not asked for here
            assert ours == example.check(text), (name, text)


def test_a_call_counts_with_and_without_its_token(brook: Brook) -> None:
    item = next(item for item in brook.items() if item.category == "tool_call")
    call = json.dumps(item.reference["call"])
    assert brook.grade(item, Reply(text=call)) == {"correct": 1}
    assert brook.grade(item, Reply(text="<|tool_call|>" + call)) == {"correct": 1}
    assert brook.grade(item, Reply(text="Sure: " + call)) == {"correct": 0}


def test_the_model_scores_as_its_card_says(brook: Brook) -> None:
    """On 92 items; the card's score weighted like them, both with their sampling errors."""
    from penstock.measure.offline import InProcess

    async def run() -> float:
        target, sink = InProcess.of("brook"), Sink()
        await target.start()
        try:
            rows = await run_task(target, brook, writer=sink, limit=92, concurrency=16)
        finally:
            await target.close()
        assert len(sink.records) == 92
        return sum(row.scores["correct"] for row in rows) / len(rows)

    score = asyncio.run(run())
    card = [told[0] for told in brook.model_card.values()]
    expected = sum(card) / len(card)
    errors = [p * (1 - p) * (1 / 4 + 1 / 100) for p in card]  # 4 items here, 100 there
    assert abs(score - expected) < 3 * math.sqrt(sum(errors)) / len(card)


def test_a_story_that_names_less_than_what_was_held_out_is_not_asked(brook: Brook) -> None:
    for item in brook.items():
        if item.category == "story":
            _, key = item.group.split(":", 1)
            assert set(key.split(",")) <= set(item.reference["story"]), item.id

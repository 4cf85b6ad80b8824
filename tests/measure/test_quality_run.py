"""Asking and grading from end to end: a known share right gives that score, failures included."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from penstock.cli.eval import command
from penstock.measure import verify
from penstock.measure.load.target import Ask, Reply, prompt_hash
from penstock.measure.quality import own
from penstock.measure.quality.runner import run_task
from penstock.measure.records import Clock, Request
from penstock.measure.run import Run

if TYPE_CHECKING:
    from scripted_server import Scripted

sys.path.insert(0, str(Path(__file__).parent))

from quality_fakes import Fake, Sink, text_of

SUMS = {f"What is {a} + {b}?": str(a + b) for a in range(5) for b in range(4)}


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    lines = [{"prompt": prompt, "reference": answer} for prompt, answer in SUMS.items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_every_item_is_asked_as_often_as_told_and_graded(sums: Path) -> None:
    target, sink = Fake(lambda ask: SUMS[text_of(ask)]), Sink()
    task = own.read(sums)
    rows = asyncio.run(run_task(target, task, writer=sink, repeats=3, concurrency=4))
    assert len(rows) == len(sink.records) == 60
    assert {row.scores["exact_match"] for row in rows} == {1}
    assert {(row.prompt_id, row.details["repeat"]) for row in rows} == {
        (str(n), k) for n in range(1, 21) for k in range(3)
    }
    first = task.items()[0]
    mine = [row for row in rows if row.prompt_id == first.id]
    assert {row.prompt_hash for row in mine} == {prompt_hash(first.ask)}
    assert {(row.task, row.arm, row.output) for row in mine} == {("sums", "fake", "0")}


def test_failures_are_rows_without_scores(sums: Path) -> None:
    target = Fake(lambda ask: None if "4 +" in text_of(ask) else "wrong")
    rows = asyncio.run(run_task(target, own.read(sums), writer=Sink()))
    failed = [row for row in rows if row.error_class == "http_500"]
    assert len(failed) == 4
    assert all(not row.scores and row.output is None for row in failed)
    assert all(row.scores == {"exact_match": 0} for row in rows if row not in failed)


def test_a_change_is_asked_and_hashed(sums: Path) -> None:
    from msgspec.structs import replace

    target = Fake(lambda ask: "")
    task = own.read(sums)
    rows = asyncio.run(
        run_task(target, task, writer=Sink(), limit=1, change=lambda a: replace(a, temperature=0.7))
    )
    assert [ask.temperature for ask in target.asked] == [0.7]
    assert rows[0].prompt_hash == prompt_hash(target.asked[0])


class _Slow(Fake):
    """Never answers; counts who waits."""

    most = 0

    def __init__(self) -> None:
        super().__init__(lambda ask: "")
        self.all_wait = asyncio.Event()

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        self.most += 1
        if self.most == 3:
            self.all_wait.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            row.error_class = "cut"
            raise
        raise AssertionError


def test_what_is_in_flight_when_a_run_is_stopped_is_written(sums: Path) -> None:
    sink = Sink()

    async def run() -> int:
        target = _Slow()
        work = asyncio.create_task(run_task(target, own.read(sums), writer=sink, concurrency=3))
        await target.all_wait.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return target.most

    assert asyncio.run(run()) == 3
    assert [row.error_class for row in sink.records if isinstance(row, Request)] == ["cut"] * 3


def test_a_grader_that_breaks_stops_the_run_with_its_own_error(sums: Path) -> None:
    class Broken(own.GradedTask):
        def grade(self, item: object, reply: Reply) -> dict[str, float]:
            raise ZeroDivisionError

    task = own.read(sums)
    broken = Broken(name="b", all_items=task.all_items, graders=task.graders, source="")
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_task(Fake(lambda ask: ""), broken, writer=Sink()))


def test_the_command_scores_a_server(scripted_server: Scripted, sums: Path, tmp_path: Path) -> None:
    """15 of 20 right, one of them cut off by a failure: 14 of 20."""
    answers = {prompt: SUMS[prompt] for prompt in list(SUMS)[:15]}
    scripted_server.configure(answers=answers, answer="wrong", ttft_s=0.001, tpot_s=0.0001)
    out = tmp_path / "run"
    told = [scripted_server.url, "--tasks", str(sums), "-o", str(out), "--json"]
    result = CliRunner().invoke(command, [*told, "--concurrency", "4"], standalone_mode=False)
    assert result.return_value == 0, result.output
    document = json.loads(result.stdout)
    (made,) = document["figures"]["arms"].values()
    figure = made["tasks"]["sums"]["scores"]["exact_match"]
    assert (figure["value"], figure["num_items"]) == (0.75, 20)
    assert "exact_match" in (out / "report.html").read_text()
    assert len(Run(out).requests) == 20
    assert verify.verify(out).ok

    scripted_server.configure(answers=SUMS, fail={"status": 500, "every": 5})
    told[4] = str(tmp_path / "second")
    result = CliRunner().invoke(command, told, standalone_mode=False)
    assert result.return_value == 1
    document = json.loads(result.stdout)
    (made,) = document["figures"]["arms"].values()
    failed = made["tasks"]["sums"]["errors"]["http_500"]
    assert 3 <= failed <= 5
    assert made["tasks"]["sums"]["scores"]["exact_match"]["value"] == 1 - failed / 20
    assert "requests failed" in document["problems"][0]


def test_the_command_tells_what_is_wrong_before_it_asks(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(command, ["--list-tasks"], standalone_mode=False)
    assert "gsm8k" in listed.stdout
    assert "Missing argument" in run(command, []).output
    assert "--judge" in run(command, ["x", "--votes", __file__]).output
    result = run(command, ["http://127.0.0.1:9", "--tasks", "nope"])
    assert "nope" in str(result.exception)
    options = ["http://127.0.0.1:9", "--judge", "http://127.0.0.1:9", "--judge-max-flips", "2"]
    assert "--judge-max-flips" in str(run(command, options).exception)

"""Asking and grading from end to end: a known share right gives that score, failures included."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from penstock.cli.eval import command
from penstock.errors import PenstockError
from penstock.measure import verify
from penstock.measure.load.target import Ask, Reply, prompt_hash
from penstock.measure.quality import own, runner
from penstock.measure.quality.figures import figures
from penstock.measure.quality.runner import run_task
from penstock.measure.quality.stopping import Stopping
from penstock.measure.records import Arm, Clock, Header, Mark, Request
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


def test_an_answer_that_makes_a_pattern_run_wild_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRADING_LIMIT_S", 0.05)
    path = tmp_path / "t.jsonl"
    grader = {"kind": "regex", "pattern": "^(a+)+$"}
    lines = [{"prompt": text, "grader": grader} for text in ("aaa", "a" * 60 + "!", "aa")]
    path.write_text("\n".join(map(json.dumps, lines)))
    sink = Sink()
    rows = asyncio.run(run_task(Fake(text_of), own.read(path), writer=sink))
    assert [row.scores for row in rows] == [{"regex": 1}, {}, {"regex": 1}]
    assert "could not be graded" in rows[1].details["not_graded"]
    (mark,) = (record for record in sink.records if isinstance(record, Mark))
    assert (mark.name, mark.facts["message"]) == ("problem", rows[1].details["not_graded"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--tasks ,", "names no task"),
        ("--grader f1", "--grader"),
        ("--system x", "--system"),
        ("--chat", "--chat"),
        ("--num-fewshot 2", "--num-fewshot"),
        ("--tasks lm:arc_easy --repeats 2", "--repeats"),
        ("--tasks lm:arc_easy --temperature 1", "--temperature"),
        ("--tasks lm:arc_easy --seed 1", "--seed"),
        ("--seed 1", "--limit"),
        ("--data .", "--data"),
        ("--prices nofile.toml", "--prices"),
        ("--tables .", "--tables"),
        ("--judge penstock:brook --judge-api-key-env HOME", "--judge-api-key-env"),
        ("--tasks lm:arc_easy --judge http://127.0.0.1:9", "--judge"),
        ("--judge-api-key-env X", "--judge-api-key-env"),
        ("--judge-max-flips 0.1", "--judge-max-flips"),
        ("--judge http://127.0.0.1:9 --judge-min-kappa 0.1", "--judge-min-kappa"),
        ("http://127.0.0.1:8 --judge http://127.0.0.1:7 --judge-rubric x", "--judge-rubric"),
    ],
)
def test_an_option_that_nothing_comes_of_is_wrong_usage(options: str, told: str) -> None:
    result = CliRunner().invoke(command, ["http://127.0.0.1:9", *options.split()])
    assert result.exit_code == 2, result.output
    assert told in result.stderr


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("inprocess:brook", "--tasks lm:arc_easy --concurrency 2", "--concurrency"),
        ("inprocess:brook", "--api-key-env HOME", "--api-key-env"),
        ("inprocess:brook?nonsense=1", "", "nonsense"),
        ("http://127.0.0.1:9", "--tasks brook,brook", "two tasks"),
        ("http://127.0.0.1:9", "--limit 0", "--limit"),
        ("http://127.0.0.1:9", "--api-key-env NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE"),
        ("http://127.0.0.1:9", "--tasks nope", "nope"),
        ("http://127.0.0.1:9", "--tasks nofile.jsonl", "cannot be read: no such file"),
        ("ftp://127.0.0.1:9", "", "ftp"),
        ("https://example.org", "--prices nofile.toml", "nofile.toml"),
    ],
)
def test_what_is_refused_before_anything_is_asked_is_wrong_usage(
    target: str, options: str, told: str
) -> None:
    result = CliRunner().invoke(command, [target, *options.split()])
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert "Errno" not in result.stderr


@pytest.mark.parametrize(
    ("option", "lines", "is_used"),
    [
        ("--grader f1", [{"prompt": "a", "reference": "b", "grader": "contains"}], False),
        ("--grader f1", [{"grader": "contains"}, {"prompt": "a", "reference": "b"}], False),
        ("--grader f1", [{"prompt": "a", "reference": "b"}], True),
        ("--max-tokens 3", [{"prompt": "a", "max_tokens": 5}, {"prompt": "b"}], True),
        ("--max-tokens 3", [{"prompt": "a", "max_tokens": 5}], False),
        ("--system x", [{"messages": [{"role": "system", "content": "y"}]}], False),
    ],
)
def test_a_default_that_every_line_overrides_is_told(
    tmp_path: Path, option: str, lines: list[dict[str, Any]], is_used: bool
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    told = ["http://127.0.0.1:9", "--tasks", str(path), *option.split()]
    result = CliRunner().invoke(command, [*told, "-o", str(tmp_path / "run")])
    assert (result.exit_code == 2) is not is_used
    assert ("nothing would come of it" in result.stderr) is not is_used
    assert not (tmp_path / "run").exists()


def test_a_target_that_cannot_be_reached_leaves_no_run(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_RUNS", str(tmp_path / "runs"))
    result = CliRunner().invoke(command, ["http://127.0.0.1:9", "--tasks", str(sums)])
    assert isinstance(result.exception, PenstockError)  # exit status 1
    assert not (tmp_path / "runs").exists()


def test_an_engine_that_does_not_start_leaves_the_log_that_is_named(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = CliRunner().invoke(command, ["penstock:no-such-model", "--tasks", str(sums)])
    assert isinstance(result.exception, PenstockError)
    assert not (tmp_path / "runs").exists()
    (log,) = tmp_path.glob("penstock-eval-*/*.log")
    assert f"`{log}`" in str(result.exception)
    assert "no-such-model" in log.read_text()


def test_the_command_scores_a_server(scripted_server: Scripted, sums: Path, tmp_path: Path) -> None:
    """15 of 20 right, one of them cut off by a failure: 14 of 20."""
    answers = {prompt: SUMS[prompt] for prompt in list(SUMS)[:15]}
    scripted_server.configure(answers=answers, answer="wrong", ttft_s=0.001, tpot_s=0.0001)
    out = tmp_path / "run"
    told = [scripted_server.url, "--tasks", str(sums), "-o", str(out), "--json"]
    told += ["--temperature", "0.5", "--seed", "3", "--limit", "20"]
    result = CliRunner().invoke(command, [*told, "--concurrency", "4"], standalone_mode=False)
    assert result.return_value == 0, result.output
    document = json.loads(result.stdout)
    (made,) = document["figures"]["arms"].values()
    figure = made["tasks"]["sums"]["scores"]["exact_match"]
    assert (figure["value"], figure["num_items"]) == (0.75, 20)
    assert "exact_match" in (out / "report.html").read_text()
    run = Run(out)
    assert sorted(row.index for row in run.requests) == list(range(20))
    assert (run.header.settings["seed"], run.header.settings["temperature"]) == (3, 0.5)
    warm = msgspec.structs.replace(own.read(sums).items()[0].ask, temperature=0.5)
    assert prompt_hash(warm) in {row.prompt_hash for row in run.requests}
    assert verify.verify(out).ok

    scripted_server.configure(answers=SUMS, fail={"status": 500, "every": 5})
    told[4] = str(tmp_path / "second")
    result = CliRunner().invoke(command, told, standalone_mode=False)
    assert result.return_value == 3
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
    options = ["http://127.0.0.1:9", "--judge", "http://127.0.0.1:9", "--judge-max-flips", "2"]
    assert "--judge-max-flips" in run(command, options).stderr
    (tmp_path / "run.json").touch()
    result = run(command, ["http://127.0.0.1:9", "-o", str(tmp_path)])
    assert (result.exit_code, "holds a run" in result.stderr) == (2, True)


COMMAND = [sys.executable, "-c", "from penstock.cli.main import main; main()", "eval"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_has_figures_and_is_not_valid(
    scripted_server: Scripted, sums: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    scripted_server.configure(answers=SUMS, ttft_s=0.2)
    told = [scripted_server.url, "--tasks", str(sums), "-o", str(out), "--concurrency", "2"]
    with subprocess.Popen([*COMMAND, *told], stdout=-1, stderr=-1, text=True) as child:
        _wait_for_rows(out, child)
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=30)
    assert child.returncode in (130, 143)
    assert f"report: {out / 'report.html'}" in stderr
    run = Run(out)
    made = run.figures()
    assert made is not None
    num_whole = sum(row.ok for row in run.requests)
    assert 1 <= num_whole < 20
    assert f"{20 - num_whole} of 20 answers are missing" in made.problems[0]
    assert f"{20 - num_whole} of 20 answers are missing" in stdout
    assert verify.verify(out).ok


def test_what_is_killed_says_what_is_missing_when_it_is_finished(
    scripted_server: Scripted, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    scripted_server.configure(answers=SUMS, ttft_s=0.2)
    told = [scripted_server.url, "--tasks", str(sums), "-o", str(out), "--concurrency", "1"]
    with subprocess.Popen([*COMMAND, *told], stdout=-1, stderr=-1) as child:
        _wait_for_rows(out, child)
        child.kill()
        child.communicate(timeout=30)
    num_rows = len(Run(out).requests)
    verify.verify(out, finish=True)
    made = Run(out).figures()
    assert made is not None
    assert f"{20 - num_rows} of 20 answers are missing" in made.problems[0]


def _wait_for_rows(out: Path, child: subprocess.Popen[Any]) -> None:
    records = out / "records.jsonl"
    until_s = time.monotonic() + 30
    while not (records.exists() and records.stat().st_size):
        assert child.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_a_signal_breaks_into_what_blocks_the_loop() -> None:
    async def run() -> None:
        with Stopping() as stopping, stopping.blocking():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)  # noqa: ASYNC251 - what blocks is tested

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_question_is_kept_once_and_shown(scripted_server: Scripted, tmp_path: Path) -> None:
    tail = "x" * 3000 + "What is <b>17</b> * 23?"
    path = tmp_path / "t.jsonl"
    line = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": tail}]}
    path.write_text(json.dumps(line | {"reference": 391}))
    scripted_server.configure(answer="30", ttft_s=0.001, tpot_s=0.0001)
    out = tmp_path / "run"
    told = [f"a={scripted_server.url}", f"b={scripted_server.url}", "--tasks", str(path)]
    told += ["--repeats", "2", "-o", str(out)]
    result = CliRunner().invoke(command, told, standalone_mode=False)
    assert result.return_value == 0, result.output
    kept = [row.details["question"] for row in Run(out).requests if "question" in row.details]
    (question,) = kept
    assert question.startswith("[system]\nS\n\n[user]\nxxx")
    assert question.endswith("What is <b>17</b> * 23?")
    assert len(question) < 2_100
    page = (out / "report.html").read_text()
    assert page.count("What is &lt;b&gt;17&lt;/b&gt; * 23?") == 4  # both arms, both repeats
    assert "<b>17" not in page
    assert verify.verify(out).ok


def test_a_judge_that_was_never_asked_is_missing() -> None:
    header = Header(
        run_id="r",
        kind="eval",
        started_at="",
        version="",
        settings={
            "judge": {
                "arm": {"name": "j", "target": "j"},
                "rubric": "",
                "min_kappa": 0.4,
                "max_flips": 0.35,
                "max_unreadable": 0.1,
            }
        },
        arms=[Arm(name="a", target="a"), Arm(name="b", target="b")],
    )
    _, problems = figures(header, [])
    assert problems == ["judge: all verdicts are missing, because the run ended before it judged."]

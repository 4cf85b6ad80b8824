"""What a comparison refuses, and what it says where something is missing or too little."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripted_server import Scripted
from tests.measure.verdict.helpers_served import SMALL, WORDS, answers
from tests.measure.verdict.helpers_simulated import Truth, simulated

from penstock.cli.compare import command
from penstock.measure import kinds
from penstock.measure.records import Mark, Request
from penstock.measure.run import Run
from penstock.measure.verdict.page import page
from penstock.measure.verdict.words import about, text

NOBODY = "http://127.0.0.1:9"
STAGES = ("quality", "repeat", "noise", "speed", "divergence")


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Exit status 2, one sentence; the arms are never reached (nobody listens there)."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for more, told in (
        (["--tasks", "lm:arc_easy"], "cannot be asked in turns"),
        (["--tasks", "nope"], "`nope`"),
        (["--alpha", "2"], "`--alpha` is `2.0`"),
        (["--blocks", "-1"], "`--blocks` is `-1`"),
        (["--limit", "0"], "`--limit` is `0`"),
        (["--success-at", "7"], "`--success-at` is `7.0`"),
        (["--concurrency", "2", "--request-rate", "2"], "exclude one another"),
        (["--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--prices", str(tmp_path / "none.toml")], "none.toml"),
        (["-o", str(tmp_path / "run")], "holds a run already"),
    ):
        result = CliRunner().invoke(command, [NOBODY, NOBODY, *more])
        assert result.exit_code == 2, (more, result.output)
        assert told in result.output, (more, result.output)
    result = CliRunner().invoke(command, [str(tmp_path / "run"), NOBODY])
    assert result.exit_code == 2
    assert f"is a finished run, and `{NOBODY}` is none" in result.output


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_is_stopped_is_not_valid(
    servers: tuple[Scripted, Scripted], prompts: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Stopped in the middle of the load: what was planned and is not there is a problem."""
    for server in servers:
        server.configure(ttft_s=0.002, tpot_s=0.001, answer=WORDS, answers=answers(0))
    path = tmp_path / "run"
    urls = [f"{name}={one.url}" for name, one in zip(("base", "variant"), servers, strict=True)]
    more = ["--prompts", str(prompts), "--blocks", "400", "--noise-blocks", "0", "-o", str(path)]
    with subprocess.Popen(
        [sys.executable, "-m", "penstock.cli.main", "compare", *urls, *SMALL, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline_s = time.monotonic() + 60
        records = path / "records.jsonl"
        while time.monotonic() < deadline_s:
            if records.is_file() and records.read_bytes().count(b'"stage":"speed"') > 100:
                break
            time.sleep(0.02)
        os.kill(process.pid, how)
        stdout, stderr = process.communicate(timeout=30)
    if how == signal.SIGTERM:
        assert process.returncode == 130
        assert "This run is not valid" in stdout
        assert str(path / "report.html") in stderr
    else:
        kinds.finish(path)
    made = Run(path).figures()
    assert made is not None
    assert (path / "report.html").is_file()
    assert len(made.problems) == 1, made.problems
    problem = made.problems[0]
    assert "the run was cut in the part `speed`" in problem
    assert "of 400 planned blocks were finished" in problem
    assert made.figures["quality"]["pooled"]["num_lost"] == 0


def test_what_was_planned_and_is_not_there_is_told() -> None:
    """Part by part, of records whose end was cut off anywhere."""
    header, records = simulated(Truth(num_items=40, blocks=4, noise_blocks=4), 3)
    header.settings["load"]["blocks"] = 4
    header.settings["plan"] = {
        "num_items": {"sums": 40},
        "num_chunks": 8,
        "noise_blocks": 4,
        "blocks": 4,
        "most_blocks": 4,
        "requests": 4,
        "divergence_tokens": 100,
    }
    records += [Mark(t_ns=0, name="done", stage=stage) for stage in STAGES]
    assert kinds.compute(header, records)[1] == []
    rows = [one for one in records if isinstance(one, Request)]
    # The last leg lost a request, although the part ended.
    without = [one for one in records if one is not rows[-1]]
    assert kinds.compute(header, without)[1] == [
        "the part `speed` is not whole: 3 of 4 planned blocks were finished"
    ]
    # Killed in the quality part: nothing else was begun, and speed, guarded, cannot be told.
    cut = records[: records.index(rows[50])]
    figures, problems = kinds.compute(header, cut)
    assert [one.split("`")[1] for one in problems] == list(STAGES)
    assert "of 40 answers of `base`" in problems[0]
    for name in ("speed", "memory"):  # the variant was asked less
        assert figures["axes"][name]["verdict"] == "cannot tell"
    assert figures["overall"]["verdict"] == "cannot tell"
    # Killed in the first block of load: figures and page are made all the same.
    cut = records[: records.index(next(row for row in rows if row.stage == "speed")) + 40]
    cut += [Mark(t_ns=0, name="done", stage=stage) for stage in STAGES[:3]]
    figures, problems = kinds.compute(header, cut)
    assert "the run was cut in the part `speed` or before it: 1 of 4" in problems[0]
    assert "cut in the part" in page(header, figures, cut)


def test_few_blocks_are_too_few_to_tell() -> None:
    """No interval that nobody can read, on any axis, in words or on the page."""
    header, records = simulated(Truth(num_items=60, blocks=2, noise_blocks=2, leg_sd=0.2), 5)
    figures, problems = kinds.compute(header, records)
    assert problems == []
    for name in ("speed", "energy"):
        axis = figures["axes"][name]
        assert (axis["verdict"], axis["num_more"], axis["low"]) == ("cannot tell", 2, None)
        assert axis["note"] == "too few blocks to tell: 2 of at least 4"
    assert "floor" not in figures["speed"]["noise"]
    assert all(row["ratio"]["high"] is None for row in figures["speed"]["metrics"])
    for told in (text(figures), page(header, figures, records)):
        assert "too few blocks to tell: 2 of at least 4" in told
        assert "e+" not in told
    assert [about(number) for number in (7, 99, 100, 30_911, 2_960)] == [
        *("7", "99", "100", "31,000", "3,000")
    ]


def test_memory_of_one_start_each_is_no_firm_verdict() -> None:
    """Two starts of one thing differ by some per cent; more than a tenth is a difference."""
    for ratio, verdict in ((0.93, "not worse"), (1.08, "not worse"), (0.85, "better")):
        header, records = simulated(Truth(num_items=40, memory_ratio=ratio), 8)
        figures, _ = kinds.compute(header, records)
        axis = figures["axes"]["memory"]
        assert (axis["verdict"], axis["margin"], axis["note"]) == (
            *(verdict, 10.0),
            "one start of each",
        )
        assert "one start of each" in page(header, figures, records)
        assert "one start of each" in figures["overall"]["sentence"]
        assert any("beyond 10 %" in line for line in figures["rule"])


def test_a_busy_machine_is_a_note() -> None:
    header, records = simulated(Truth(num_items=40), 6)
    header.environment = {
        "cpu": {"num_usable_cores": 2},
        "load": {"busy_cores": 1.2, "busiest": [{"name": "indexer", "cores": 1.2}]},
    }
    assert kinds.compute(header, records)[0]["notes"] == []  # who made it of finished runs
    header.settings["plan"] = {}
    figures, problems = kinds.compute(header, records)
    assert problems == []
    assert "indexer" in figures["notes"][0]
    assert figures["notes"][0] in page(header, figures, records)
    assert figures["notes"][0] in text(figures)

"""`penstock bench startup|latency|throughput|engines`, end to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from scripted_server import Scripted

from penstock.cli.bench import command
from penstock.measure import kinds
from penstock.measure.records import Mark
from penstock.measure.run import Run

BROOK = "brook?num_threads=1"


def bench(*words: str) -> Result:
    return CliRunner().invoke(command, list(words), standalone_mode=False)


def document(result: Result) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(result.stdout)
    return made


def verified(path: Path) -> Run:
    """The run, whose figures are those of its records."""
    run = Run(path)
    made = run.figures()
    assert made is not None
    assert kinds.compute(run.header, run.records) == (made.figures, made.problems)
    assert (path / "report.html").read_text().startswith("<!DOCTYPE html>")
    return run


def cells(made: dict[str, Any], figure: str, stage: str = "") -> dict[str, Any]:
    rows = [row for row in made["figures"]["rows"] if row["figure"] == figure]
    (row,) = [row for row in rows if not stage or row["stage"] == stage]
    return {name: cell and cell["median"] for name, cell in row["arms"].items()}


def test_engines_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = bench(
        *("engines", f"http={BROOK}", f"in=inprocess:{BROOK}", "fake=fake:m"),
        "bad=fake:m?mode=dies",
        *("--rounds", "2", "--lengths", "40x6", "--latency-requests", "2"),
        *("--load-lengths", "30x5,20x4", "--requests", "4", "--concurrency", "2"),
        *("--meter-interval", "0.1", "--cpu-watts", "100", "--json", "-o", str(out)),
    )  # fmt: skip
    assert result.return_value == 3  # an arm failed
    made = document(result)
    (problem,) = made["problems"]
    assert problem.startswith("bad failed in round 1 (startup): The engine `fake` ended")
    run = verified(out)
    work = "throughput 2 at once"
    begun = [one.arm for one in run.records if isinstance(one, Mark) and one.name == "started"]
    assert begun == ["http", "in", "fake", "fake", "in", "http"]  # the second round is reversed
    rows = [row for row in run.requests if row.phase == "steady" and row.stage != "startup"]
    assert len(rows) == 3 * 2 * (2 + 4)
    assert all(row.ok and row.n_out == row.details["asked_out"] for row in rows)
    one = [row for row in rows if row.stage == "latency 40x6"]
    assert {row.n_in for row in one} == {40}
    assert {row.n_out for row in one} == {6}
    prompts = [(row.arm, row.prompt_hash) for row in rows]
    assert len(set(prompts)) == len(prompts)
    both = {arm: {row.prompt_hash for row in rows if row.arm == arm} for arm in ("http", "in")}
    assert both["http"] == both["in"]
    assert cells(made, "output_tokens")["http"] == cells(made, "output_tokens")["fake"] == 18
    assert min(cells(made, "joules_per_output_token", work)[arm] for arm in both) > 0
    assert cells(made, "load_s")["http"] is None
    assert cells(made, "load_s")["in"] > 0
    assert cells(made, "peak_rss_bytes")["fake"] > 2**20
    (failed,) = made["figures"]["arms"]["bad"]["failed"]
    assert "no such weights" in failed["reason"]
    assert cells(made, "total_s")["bad"] is None


def test_startup_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = bench(
        *("startup", "slow=fake:m?delay_s=0.4", "fast=fake:m", "--rounds", "2"),
        *("--page-cache", "cold", "-o", str(out)),
    )
    assert result.return_value == 0, result.output
    run = verified(out)
    made = run.figures()
    assert made is not None
    (row,) = [row for row in made.figures["rows"] if row["figure"] == "port_s"]
    assert row["arms"]["slow"]["min"] >= 0.4
    assert row["arms"]["slow"]["median"] - row["arms"]["fast"]["median"] > 0.2
    assert "total_s" in result.stdout
    assert "report.html" in result.stderr
    assert sorted(file.name for file in (out / "logs").iterdir()) == ["fast.log", "slow.log"]


def test_short_answers_make_the_run_invalid(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = bench(
        *("latency", "fake:m?short", "--rounds", "1", "--requests", "1", "--lengths", "9x4"),
        *("--json", "-o", str(out)),
    )
    assert result.return_value == 3
    assert "1 of 1 answers are not as long as asked" in document(result)["problems"][0]
    verified(out)


def test_a_url_is_asked_in_chat_with_its_header(
    scripted_server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_GATEWAY", "gate-way-value-1")
    limits = []
    for number, more in enumerate(("", "?dialect=openai-completions")):
        result = bench(
            *("latency", scripted_server.url + more, "--header-env", "api-key=MY_GATEWAY"),
            *("--rounds", "1", "--requests", "1", "--lengths", "9x4", "--meter-interval", "0"),
            *("--json", "-o", str(tmp_path / str(number))),
        )
        assert result.return_value == 0, result.exc_info
        (arm,) = document(result)["figures"]["arms"].values()
        limits.append([limit for limit in arm["limits"] if "asked as chats" in limit])
        run = tmp_path / str(number)
        assert not any(b"gate-way-value-1" in file.read_bytes() for file in run.glob("*.*"))
    assert [len(told) for told in limits] == [1, 0]
    entries = scripted_server.log()
    assert {entry["headers"]["api-key"] for entry in entries} == {"gate-way-value-1"}


def test_a_run_that_is_ended_by_sigterm_prints_what_it_has(tmp_path: Path) -> None:
    """The engine is penstock's own; it is ended before its first answer, or soon after."""
    out = tmp_path / "run"
    words = ["startup", "brook?num_threads=1", "--rounds", "9", "--output", str(out)]
    command_line = [sys.executable, "-m", "penstock.cli.main", "bench", *words]
    with subprocess.Popen(command_line, stdout=-1, stderr=-1, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "round 1 of 9: penstock:brook?num_threads=1\n"
        process.send_signal(signal.SIGTERM)
        told, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "This run is not valid:" in told
    assert "interrupted, with 0 of 9 rounds ended" in told
    assert f"report: {out / 'report.html'}" in errors
    assert verified(out).header.settings["num_rounds"] == 9


def test_throughput_takes_all_at_once_from_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.0,30,4\n2023-11-16 18:17:04.0,900,6\n"
    )
    out = tmp_path / "run"
    result = bench(
        *("throughput", f"inprocess:{BROOK}", "--trace", str(trace), "--context", "100"),
        *("--requests", "2", "--rounds", "1", "--json", "-o", str(out)),
    )
    assert result.return_value == 0, result.output
    run = verified(out)
    assert run.header.settings["trace"]["num_clipped"] == 1
    rows = [row for row in run.requests if row.stage == "throughput all at once"]
    assert sorted((row.n_in, row.n_out) for row in rows) == [(30, 4), (94, 6)]
    sent = [row.t_sent_ns or 0 for row in rows]
    assert max(sent) < min(row.t_done_ns or 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("throughput", "brook", "--context", "9"), "`--context` is set without `--trace`"),
        (("latency", "brook", "--lengths", "9"), "`--lengths` is `9`"),
        (("startup", "vllm:m?executable=/no/vllm"), "`/no/vllm` is no program"),
        (("startup", "inprocess:brook?threads=1"), "has no option `threads`"),
        (("startup", "x=brook", "x=brook"), "labelled `x`"),
        (("startup", "brook", "--header-env", "a=HOME"), "no arm is one"),
        (("throughput", "brook", "--load-lengths", "0x3"), "`--load-lengths` is `0x3`"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    result = bench(*words, "-o", str(tmp_path / "run"))
    assert isinstance(result.exception, click.UsageError)
    assert says in result.exception.message
    assert not (tmp_path / "run").exists()

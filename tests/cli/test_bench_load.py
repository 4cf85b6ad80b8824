"""`penstock bench serve` and `sweep`, whole, against a server that does what a script says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from penstock.cli import bench_print
from penstock.cli.bench import command
from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.load import tokens
from penstock.measure.load.settings import LoadSettings, check
from penstock.measure.run import Run

sys.path.insert(0, str(Path(__file__).parent.parent / "measure"))
from scripted_server import Scripted, scripted

QUICK = ["--num-warmups", "2", "--meter-interval", "0", "--random-input-len", "12"]
QUICK += ["--random-output-len", "4"]


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with scripted(ttft_s=0.01, tpot_s=0.002) as running:
        yield running


def run(*arguments: object, path: Path | None = None) -> Result:
    given = [str(argument) for argument in arguments]
    if path is not None:
        given += ["--output", str(path)]
    return CliRunner().invoke(command, given, standalone_mode=False)


def told(result: Result) -> dict[str, Any]:
    assert result.exception is None, result.exc_info
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_an_address_alone_is_serve(server: Scripted, tmp_path: Path) -> None:
    path = tmp_path / "run"
    load = ["--concurrency", "2", "--num-prompts", "12", *QUICK]
    result = run(server.url, *load, "--slo", "ttft_p95=5s,e2e=9s", path=path)
    assert result.return_value == 0, result.output
    for text in ("12 of 12 answered", "time to first token, from due", "kept", "100 %"):
        assert text in result.stdout
    assert result.stderr.splitlines()[0].startswith("Connecting to 127.0.0.1:")
    assert result.stderr.splitlines()[-1] == f"report: {path / 'report.html'}"
    page = (path / "report.html").read_text()
    for text in ("What it came to", "Over time", "e2e_from_due_s", "t_done - t_due", "svg"):
        assert text in page
    saved = Run(path)
    assert sum(row.phase == "warmup" for row in saved.requests) == 2
    assert saved.header.settings["load"]["num_prompts"] == 12
    assert saved.header.settings["prefix"] == "cold"


def test_options_may_come_first_and_figures_are_json(server: Scripted, tmp_path: Path) -> None:
    load = ["--request-rate", "40", "--burstiness", "inf", "--num-prompts", "20", "--json", *QUICK]
    found = told(run(*load, server.url, path=tmp_path / "run"))
    (stage,) = found["figures"]["stages"]
    assert stage["loop"] == "open"
    assert stage["requests"]["num_ok"] == 20
    assert stage["rate"]["requested_per_s"] == 40
    assert stage["rate"]["scheduled_per_s"] == pytest.approx(40)
    assert stage["tokens"]["output"]["mean"] == 4
    assert found["run"] == str(tmp_path / "run")


def test_a_broken_limit_is_exit_status_4(server: Scripted, tmp_path: Path) -> None:
    load = ["--concurrency", "1", "--num-prompts", "3", *QUICK]
    result = run(server.url, *load, "--slo", "ttft_p50=1us", path=tmp_path / "run")
    assert result.return_value == 4, result.exc_info
    assert "broken" in result.stdout


def test_a_trace_keeps_its_offsets(server: Scripted, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    offsets = [0.0, 0.05, 0.3, 0.31, 0.6]
    lines = [f"2023-11-16 18:00:0{offset:.7f},{20 + n},{n + 2}" for n, offset in enumerate(offsets)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))
    load = ["--trace", trace, "--time-scale", "0.5", "--num-warmups", "3", "--meter-interval", "0"]
    found = told(run(server.url, *load, "--json", path=tmp_path / "run"))
    rows = sorted(
        (row for row in Run(tmp_path / "run").requests if row.stage == "load"),
        key=lambda row: row.index,
    )
    zero_ns = rows[0].t_due_ns or 0
    assert [((row.t_due_ns or 0) - zero_ns) / 1e9 for row in rows] == pytest.approx(
        [offset / 2 for offset in offsets], abs=1e-6
    )
    assert [row.n_out for row in rows] == [2, 3, 4, 5, 6]
    # the scripted server counts words and has no tokenizer: lengths come from the warm-up's usage
    assert [row.n_in for row in rows] == [20, 21, 22, 23, 24]
    assert any("usage of the warm-up" in note for note in found["figures"]["notes"])


def test_seeds_reproduce_what_is_asked_and_when(server: Scripted, tmp_path: Path) -> None:
    asked = []
    for number, seed in enumerate((5, 5, 6)):
        server.configure(ttft_s=0.002, tpot_s=0.001)
        path = tmp_path / str(number)
        load = ["--request-rate", "60", "--num-prompts", "10", "--seed", seed, *QUICK]
        told(run(server.url, *load, "--json", path=path))
        rows = sorted(Run(path).requests, key=lambda row: (row.phase, row.index))
        measured = [row for row in rows if row.stage == "load"]
        zero_ns = measured[0].t_due_ns or 0
        dues = [(row.t_due_ns or 0) - zero_ns for row in measured]
        asked.append(([row.prompt_hash for row in rows], dues))
    assert asked[0] == asked[1]
    assert not set(asked[0][0]) & set(asked[2][0])
    assert asked[0][1] != asked[2][1]


def test_prompts_of_a_file_are_asked_as_they_are(server: Scripted, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two three", "max_tokens": 5}\n{"prompt": "four"}\n')
    server.configure(ttft_s=0.002, tpot_s=0.001)
    load = ["--prompts", prompts, "--max-tokens", "3", "--concurrency", "1", "--num-prompts", "6"]
    found = told(run(server.url, *load, "--num-warmups", "0", "--json", path=tmp_path / "run"))
    lengths = {(row.n_in, row.n_out) for row in Run(tmp_path / "run").requests}
    assert {n_out for _, n_out in lengths} == {5, 3}
    assert any("2 different prompts" in note for note in found["figures"]["notes"])


def test_a_search_brackets_the_capacity(tmp_path: Path) -> None:
    """Two places, 40 ms an answer: 50 requests a second; the client's machine may take some."""
    with scripted(ttft_s=0.01, tpot_s=0.01, max_running=2) as server:
        load = ["--duration", "0.8", "--ramp", "0", "--burstiness", "inf", "--request-rate", "30"]
        load += ["--slo", "e2e_p90=0.12s", "--precision", "0.4", *QUICK, "--json"]
        found = told(run("sweep", server.url, *load, path=tmp_path / "run"))
    search = found["figures"]["search"]
    assert search["highest_passing"] <= 58
    assert search["highest_passing"] < search["lowest_failing"] <= 120
    assert len(found["figures"]["stages"]) == len(search["tried"])


def test_a_sweep_has_a_stage_for_each_point(server: Scripted, tmp_path: Path) -> None:
    server.configure(ttft_s=0.005, tpot_s=0.001)
    path = tmp_path / "run"
    load = ["--concurrencies", "1,2,4", "--duration", "0.4", "--ramp", "0", *QUICK]
    result = run("sweep", server.url, *load, path=path)
    assert result.return_value == 0, result.output
    assert "concurrency=4" in result.stdout
    page = (path / "report.html").read_text()
    assert "Speed of one user against throughput of all" in page
    stages = {row.stage for row in Run(path).requests}
    assert stages == {"warmup", "concurrency=1", "concurrency=2", "concurrency=4"}
    hashes = [row.prompt_hash for row in Run(path).requests]
    assert len(set(hashes)) == len(hashes)  # no stage finds its prompts in a cache


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"request_rate": 1.0, "concurrency": 2}, "`--request-rate` and `--concurrency` exclude"),
        ({"burstiness": 2.0}, "`--burstiness` goes with --request-rate"),
        ({"max_concurrency": 2, "concurrency": 2}, "`--max-concurrency` goes with an open loop"),
        ({"time_scale": 2.0}, "`--time-scale` goes with --trace"),
        ({"prompts": "x", "random_input_len": "5"}, "`--random-input-len` goes with made-up"),
        ({"trace": "x", "prefix_share": 0.5}, "`--prefix-share` goes with made-up"),
        ({"max_tokens": 5}, "`--max-tokens` goes with --prompts"),
        ({"prefix_share": 1.5}, "`--prefix-share 1.5` is more than 1"),
        ({"prefix_share": 0.5, "random_prefix_len": 5}, "exclude one another"),
        ({"request_rate": float("inf")}, "needs `--num-prompts`"),
        ({"request_rate": -1.0}, "`--request-rate -1` is not more than 0"),
        ({"concurrency": 0}, "`--concurrency 0` is not more than 0"),
        ({"cooldown": 1.0, "concurrency": 1}, "`--cooldown` goes with an open loop"),
        ({"goodput": "ttft_p95=1s"}, "no limit of one request"),
        ({"slo": "what=1s"}, "`what=1s`"),
        ({"rate_schedule": "5"}, "`--rate-schedule`"),
        ({"random_output_len": "0"}, "`--random-output-len 0`"),
        ({"trace": "x", "ramp": 3.0}, "needs `--duration`"),
        ({"duration": float("nan")}, "`--duration nan`"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(LoadSettings(**options))
    assert sentence in error.value.message
    assert error.value.message.count(". ") == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rates", "1,x"], "`--rates 1,x` is no list of numbers"),
        (["--rates", "1", "--concurrencies", "1"], "exclude one another"),
        (["--concurrency", "3"], "`--concurrency` is one load"),
        (["--request-rate", "3"], "where a search"),
        (["--request-rate", "3", "--slo", "ttft=1s"], "where a search"),
        (["--request-rate", "inf", "--num-prompts", "3", "--slo", "ttft_p95=1s"], "cannot begin"),
        (["--rates", "4,4.0"], "a number twice"),
        (["--concurrencies", "0.3"], "no list of whole numbers"),
        (["--rates", "1,2", "--precision", "0.1"], "`--precision` goes with a search"),
        (["--most-rate", "5"], "`--most-rate` goes with a search"),
        (["--slo", "ttft_p95=1s", "--most-rate", "nan"], "`--most-rate nan`"),
        (["--slo", "ttft_p95=1s", "--most-clients", "4"], "`--most-clients` goes with a sweep"),
    ],
)
def test_what_a_sweep_cannot_be(options: list[str], sentence: str) -> None:
    result = run("sweep", "http://127.0.0.1:1", *options)
    assert isinstance(result.exception, click.UsageError)
    assert sentence in result.exception.message


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["http://127.0.0.1:1", "--timeout", "nan"], "`--timeout nan`"),
        (["http://127.0.0.1:1", "--timeout", "-1"], "`--timeout -1`"),
        (["http://127.0.0.1:1", "--idle", "-5"], "`--idle -5`"),
        (["http://127.0.0.1:1", "--idle", "5", "--meter-interval", "0"], "measures nothing"),
        (["http://127.0.0.1:1", "--duration", "inf"], "would never end"),
        (["brook", "--api-key-env", "HOME"], "`--api-key-env` goes with a URL"),
        (["brook", "--header-env", "a=HOME"], "`--header-env` goes with a URL"),
        (["http://127.0.0.1:1", "--header-env", "a=NOT_SET"], "`NOT_SET` is not set"),
        (["http://127.0.0.1:1", "--header-env", "SECRET"], "is no `NAME=VARIABLE`"),
        (["http://127.0.0.1:1", "--request-rate", "4", "--concurrency", "4"], "exclude"),
        (["http://127.0.0.1:1", "--request-rate", "0"], "`--request-rate 0` is not more than 0"),
        (["http://127.0.0.1:1", "--slo", "ttft_p95=0.5"], "has no unit"),
        (["http://127.0.0.1:1", "--slo", "ttft_p95=5mss"], "has the unit `mss`"),
        (["http://127.0.0.1:1", "--trace", "none.csv"], "cannot be read: No such file"),
        (["http://127.0.0.1:1", "--tokenizer", "none"], "`--tokenizer none` is no file"),
        (["localhost:8000"], "did you mean `http://localhost:8000`?"),
    ],
)
def test_what_a_session_cannot_be(options: list[str], sentence: str) -> None:
    result = run(*options)
    assert isinstance(result.exception, click.UsageError)
    assert sentence in result.exception.message
    assert result.exception.exit_code == 2


def test_a_directory_that_holds_a_run_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    result = run("http://127.0.0.1:1", path=tmp_path)
    assert isinstance(result.exception, click.UsageError)
    assert "holds a run already" in result.exception.message


def test_prompts_beyond_the_context_are_refused_before_the_load(
    server: Scripted, tmp_path: Path
) -> None:
    server.configure(max_model_len=1024)
    result = run(server.url, "--random-input-len", "5000", path=tmp_path / "run")
    assert isinstance(result.exception, click.UsageError)
    assert "`5128` tokens do not fit into the context of" in result.exception.message
    assert not (tmp_path / "run").exists()


def test_answers_that_are_shorter_than_was_fixed_are_told(server: Scripted, tmp_path: Path) -> None:
    server.configure(ttft_s=0.005, tpot_s=0.001, answer="one two three")
    load = ["--concurrency", "1", "--num-prompts", "4", *QUICK, "--json"]
    found = told(run(server.url, *load, path=tmp_path / "run"))
    (note,) = [note for note in found["figures"]["notes"] if "ignore_eos" in note]
    assert note.startswith("4 of 4 answers have not the length that was fixed (3 of 4 tokens")


def test_a_header_comes_from_the_environment_and_stays_there(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.configure(ttft_s=0.005, tpot_s=0.001)
    monkeypatch.setenv("MY_GATEWAY", "gate-way-value-1")
    load = ["--concurrency", "1", "--num-prompts", "2", *QUICK]
    result = run(server.url, *load, "--header-env", "api-key=MY_GATEWAY", path=tmp_path / "run")
    assert result.return_value == 0, result.exc_info
    assert {entry["headers"]["api-key"] for entry in server.log()} == {"gate-way-value-1"}
    for file in (tmp_path / "run").iterdir():
        assert b"gate-way-value-1" not in file.read_bytes()


def test_variables_of_a_server_do_not_change_a_load(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.configure(ttft_s=0.005, tpot_s=0.001)
    monkeypatch.setenv("PENSTOCK_MODEL", "another")
    monkeypatch.setenv("PENSTOCK_SEED", "7")
    load = ["--concurrency", "1", "--num-prompts", "2", *QUICK]
    assert run(server.url, *load, path=tmp_path / "run").return_value == 0
    saved = Run(tmp_path / "run")
    assert saved.header.settings["load"]["seed"] == 0
    assert saved.header.arms[0].model == "scripted"


def test_a_sweep_that_was_killed_between_stages_is_not_valid(
    server: Scripted, tmp_path: Path
) -> None:
    server.configure(ttft_s=0.005, tpot_s=0.001)
    path = tmp_path / "run"
    load = ["--concurrencies", "1,2", "--duration", "0.2", "--ramp", "0", *QUICK]
    assert run("sweep", server.url, *load, path=path).return_value == 0
    lines = (path / "records.jsonl").read_bytes().splitlines(keepends=True)
    last = next(
        n for n, line in enumerate(lines) if b"concurrency=1" in line and b"stage_end" in line
    )
    (path / "records.jsonl").write_bytes(b"".join(lines[: last + 1]))
    made = kinds.finish(path)
    assert made.problems == ["The sweep was interrupted: 1 stages were begun of 1,2."]
    assert made.problems[0] in (path / "report.html").read_text()


def test_all_at_once_is_a_load(server: Scripted, tmp_path: Path) -> None:
    server.configure(ttft_s=0.01, tpot_s=0.001)
    load = ["--request-rate", "inf", "--num-prompts", "8", "--json", *QUICK]
    (stage,) = told(run(server.url, *load, path=tmp_path / "run"))["figures"]["stages"]
    assert stage["requests"]["num_ok"] == 8
    assert stage["throughput_window"] == "whole stage"
    assert stage["problems"] == []


def test_a_schedule_that_is_over_ends_the_window(server: Scripted, tmp_path: Path) -> None:
    server.configure(ttft_s=0.01, tpot_s=0.001)
    load = ["--rate-schedule", "0.5@40", "--duration", "20", "--json", *QUICK]
    (stage,) = told(run(server.url, *load, path=tmp_path / "run"))["figures"]["stages"]
    assert stage["window"]["duration_s"] == pytest.approx(0.5)
    assert stage["rate"]["scheduled_per_s"] > 20


def test_a_bench_that_was_interrupted_before_its_load_is_told() -> None:
    figures = {"stages": [], "search": None, "notes": []}
    assert bench_print.text(figures) == ""


def test_a_tokenizer_that_fails_midway_is_done_without(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[str] = []

    def count(text: str) -> int:
        counts.append(text)
        if len(counts) == 5:
            raise ValueError("status 503")
        return len(text)

    monkeypatch.setattr(tokens, "from_server", lambda *_, **__: tokens.Counter(count, "It"))
    server.configure(ttft_s=0.005, tpot_s=0.001)
    load = ["--concurrency", "1", "--num-prompts", "3", *QUICK]
    found = told(run(server.url, *load, "--json", path=tmp_path / "run"))
    assert "It failed and was not used: status 503." in found["figures"]["notes"]
    assert any("usage of the warm-up" in note for note in found["figures"]["notes"])


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    result = run("http://127.0.0.1:1", *QUICK, path=tmp_path / "run")
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "run").exists()


def test_help_says_where_the_options_are() -> None:
    told = CliRunner().invoke(command, ["--help"]).output
    assert "--request-rate" in told
    assert "penstock bench serve --help" in " ".join(told.split())


def test_help_imports_nothing_that_measures() -> None:
    code = (
        "import sys; from penstock.cli.main import cli\n"
        "try: cli.main(['bench', '--help'], standalone_mode=False)\n"
        "finally: print([m for m in sys.modules if m.startswith('penstock.measure')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sweep" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"


def test_answers_have_their_price(server: Scripted, tmp_path: Path) -> None:
    """12 to 14 tokens in at 2 USD, 4 out at 10 USD a million; the machine at 3.6 USD an hour."""
    prices = tmp_path / "prices.toml"
    prices.write_text(
        '[[price]]\nprovider = "me"\nmodel = "scripted"\n'
        "usd_in_per_million = 2\nusd_out_per_million = 10\n"
    )
    server.configure(ttft_s=0.005, tpot_s=0.001)
    load = ["--concurrency", "1", "--num-prompts", "5", *QUICK, "--prices", prices]
    result = run(
        server.url, *load, "--provider", "me", "--usd-per-hour", "3.6", path=tmp_path / "run"
    )
    assert result.return_value == 0, result.exc_info
    rows = [row for row in Run(tmp_path / "run").requests if row.stage == "load"]
    for row in rows:
        assert row.n_in is not None
        assert row.usd == pytest.approx(row.n_in * 2e-6 + 4 * 10e-6)
    assert "bought" in result.stdout
    assert "machine" in result.stdout
    assert Run(tmp_path / "run").header.prices[rows[0].arm]["model"] == "scripted"

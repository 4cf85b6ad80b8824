"""`penstock bench serve` and `sweep`, whole, against a server that does what a script says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from penstock.cli.bench import command
from penstock.errors import ConfigError
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
    for text in ("12 of 12 answered", "ttft_from_due_s", "kept", "100 %", "report.html"):
        assert text in result.stdout
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


def test_a_broken_limit_is_exit_status_1(server: Scripted, tmp_path: Path) -> None:
    load = ["--concurrency", "1", "--num-prompts", "3", *QUICK]
    result = run(server.url, *load, "--slo", "ttft_p50=1us", path=tmp_path / "run")
    assert result.return_value == 1, result.exc_info
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
    ],
)
def test_what_a_sweep_cannot_be(options: list[str], sentence: str) -> None:
    result = run("sweep", "http://127.0.0.1:1", *options)
    assert isinstance(result.exception, ConfigError)
    assert sentence in result.exception.message


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    result = run("http://127.0.0.1:1", *QUICK, path=tmp_path / "run")
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "run").exists()


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

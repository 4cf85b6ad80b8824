"""Runs listed, filtered, shown, laid side by side and exported."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.cli.results import command
from penstock.errors import ConfigError
from penstock.measure.records import Arm, Request
from penstock.measure.results import export, show, store
from penstock.measure.results.diff import diff
from penstock.measure.results.flat import flat
from penstock.measure.run import FIGURES, HEADER, Run

MakeRun = Callable[..., Path]


def ids(found: list[store.Entry]) -> list[str]:
    return [entry.run_id for entry in found]


@pytest.fixture
def three(make_run: MakeRun) -> None:
    make_run("20261120T1-import-aaa", started_at="2026-11-20T01:00:00Z")
    make_run(
        "20261121T1-import-bbb",
        started_at="2026-11-21T01:00:00Z",
        arms=[Arm(name="b", target="t", model="Qwen", engine="penstock", engine_version="0.1")],
    )
    make_run("20261122T1-import-ccc", started_at="2026-11-22T01:00:00Z", finish=False)


@pytest.mark.usefixtures("three")
def test_list_and_filters() -> None:
    a, b, c = "20261120T1-import-aaa", "20261121T1-import-bbb", "20261122T1-import-ccc"
    everything = store.entries()
    assert ids(everything) == [c, b, a], "newest first"
    assert ids(store.select(everything, model="qwen")) == [b]
    assert ids(store.select(everything, engine="PENSTOCK 0")) == [b]
    assert ids(store.select(everything, since="2026-11-21")) == [c, b]
    assert ids(store.select(everything, valid=True)) == [b, a]
    assert ids(store.select(everything, valid=False)) == [c]
    assert ids(store.select(everything, kind="bench")) == []
    assert ids(store.select(everything, text="llama")) == [c, a]
    assert ids(store.select(everything, text="not finished")) == [c]
    assert ids(store.select(everything, sort="model")) == [c, a, b]
    assert ids(store.select(everything, sort="records")) == [b, a, c]
    assert everything[1].num_records == 20
    with pytest.raises(ConfigError, match="neither a date nor an age"):
        store.select(everything, since="yesterday")
    assert len(store.select(everything, since="3000d")) == 3
    assert not store.select(everything, since="0m")


@pytest.mark.usefixtures("three")
def test_find(runs: Path) -> None:
    assert store.find("20261121").name == "20261121T1-import-bbb"
    assert store.find("bbb").name == "20261121T1-import-bbb"
    path = runs / "20261120T1-import-aaa"
    assert store.find(str(path)) == path
    assert store.find(str(path / "report.html")) == path
    with pytest.raises(ConfigError, match="may be one of 3 runs"):
        store.find("202611")
    with pytest.raises(ConfigError, match="There is no run `zzz`"):
        store.find("zzz")


def test_damaged_runs_are_listed(make_run: MakeRun) -> None:
    path = make_run()
    (path / FIGURES).write_text("{")
    (entry,) = store.entries()
    assert entry.valid is None
    assert "figures.json is damaged" in entry.problems[0]
    (path / HEADER).write_text("no JSON")
    (entry,) = store.entries()
    assert "run.json is damaged" in entry.problems[0]
    done = CliRunner().invoke(command, [])
    assert done.exit_code == 0
    assert "damaged" in done.output


def test_no_runs() -> None:
    done = CliRunner().invoke(command, [])
    assert (done.exit_code, done.stdout) == (0, "")
    assert json.loads(CliRunner().invoke(command, ["--json"]).stdout) == []


def test_diff(make_run: MakeRun) -> None:
    slow = [
        Request(arm="a", index=index, t_sent_ns=0, t_first_ns=100_000_000, t_done_ns=400_000_000)
        for index in range(20)
    ]
    a = Run(make_run("a1"))
    b = Run(
        make_run(
            "b1",
            rows=slow,
            settings={"format": "guidellm", "has_timeline": True, "seed": 7},
            environment={"cpu": {"name": "other"}, "load": {"average": [9, 9, 9]}},
        )
    )
    found = diff(a, b)
    by_path = {row.path: row for row in found.rows}
    row = by_path["groups[a].ttft_s.p50"]
    assert (row.a, row.b) == (pytest.approx(0.05), pytest.approx(0.1))
    assert row.ratio == pytest.approx(2.0)
    assert by_path["groups[a].tpot_s.p50"].b is None
    assert by_path["groups[a].tpot_s.p50"].ratio is None
    assert [(row.path, row.a, row.b) for row in found.settings] == [("seed", None, 7)]
    assert [row.path for row in found.environment] == ["cpu.name"], "not what changes by itself"
    assert not found.comparable
    same = diff(a, a)
    assert same.comparable
    assert all(row.a == row.b for row in same.rows)


def test_diff_of_arms_with_other_names(make_run: MakeRun) -> None:
    rows = [Request(arm="b", index=1, t_sent_ns=0, t_done_ns=400_000_000)]
    a = Run(make_run("a1"))
    b = Run(make_run("b1", rows=rows, arms=[Arm(name="b", target="t", model="llama-int8")]))
    found = diff(a, b)
    assert "groups[a].e2e_s.p50" in {row.path for row in found.rows if row.ratio}
    assert [row.path for row in found.arms if row.path == "0.model"]


def test_diff_refuses(make_run: MakeRun) -> None:
    a = Run(make_run("a1"))
    other = Run(make_run("b1", kind="bench", finish=False))
    with pytest.raises(ConfigError, match="kind `import` and `b1` of the kind `bench`"):
        diff(a, other)
    stopped = Run(make_run("c1", finish=False))
    with pytest.raises(ConfigError, match="`c1` was not finished"):
        diff(a, stopped)


def test_diff_command(make_run: MakeRun) -> None:
    make_run("a1")
    make_run(
        "b1", rows=[Request(arm="a", t_sent_ns=0, t_first_ns=100_000_000, t_done_ns=2 * 10**8)]
    )
    done = CliRunner().invoke(command, ["diff", "a1", "b1", "--match", "ttft_s.p50"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "ttft_s.p50" in line]
    assert line.split() == ["groups[a].ttft_s.p50", "50.0", "ms", "100", "ms", "2.00"]
    done = CliRunner().invoke(command, ["diff", "a1", "a1"])
    assert "no figure differs" in done.output
    told = json.loads(CliRunner().invoke(command, ["diff", "a1", "b1", "--json"]).output)
    assert told["comparable"] is True


def test_diff_shows_the_headline_figures(make_run: MakeRun) -> None:
    make_run("a1")
    slow = [Request(arm="a", t_sent_ns=0, t_first_ns=100_000_000, t_done_ns=2 * 10**8)]
    make_run("b1", rows=slow)
    short = CliRunner().invoke(command, ["diff", "a1", "b1"]).stdout
    (line,) = [line for line in short.splitlines() if line.startswith("time to first token, p50")]
    assert line.split()[-5:] == ["50.0", "ms", "100", "ms", "2.00"]
    assert "groups[" not in short
    assert (
        "groups[a].ttft_s.max" in CliRunner().invoke(command, ["diff", "a1", "b1", "--all"]).stdout
    )


def test_a_rate_has_no_unit_of_its_own() -> None:
    assert show.cell(4.0, "requested_per_s") == "4.00 /s"


@pytest.mark.usefixtures("three")
def test_wrong_filters_are_wrong_usage(tmp_path: Path) -> None:
    for arguments in (["--kind", "benhc"], ["--since", "yesterday"]):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2, done.output
        assert "Error: " in done.stderr
    with pytest.raises(ConfigError, match=r"has no `run\.json`"):
        store.find(str(tmp_path))


@pytest.mark.usefixtures("three")
def test_the_list_says_what_a_run_is() -> None:
    newest, middle, oldest = store.entries()
    assert (newest.state, newest.key_figure) == ("unfinished", "")
    assert (oldest.state, oldest.targets, oldest.num_requests) == ("valid", ["a"], 20)
    assert middle.targets == ["b"]
    assert oldest.key_figure == "time to first token, p50 50.0 ms"
    done = CliRunner().invoke(command, []).stdout.splitlines()
    assert done[0].split() == [
        "run",
        "kind",
        "target",
        "model",
        "requests",
        "state",
        "key",
        "figure",
    ]
    assert "unfinished" in done[1]


def test_flat_names_things() -> None:
    figures = {"x": [{"arm": "a", "v": 1}, {"arm": "b", "v": 2}], "y": [3, {}], "z": {"w": None}}
    assert flat(figures) == {
        "x[a].arm": "a",
        "x[a].v": 1,
        "x[b].arm": "b",
        "x[b].v": 2,
        "y[0]": 3,
        "y[1]": {},
        "z.w": None,
    }
    twice = {"x": [{"arm": "a", "v": 1}, {"arm": "a", "v": 2}]}
    assert set(flat(twice)) == {"x[0].arm", "x[0].v", "x[1].arm", "x[1].v"}


FORMULA = "=HYPERLINK(1)"


@pytest.fixture
def exported(make_run: MakeRun) -> Run:
    rows = [
        Request(
            arm="a", index=0, t_due_ns=0, t_sent_ns=10**9, t_first_ns=2 * 10**9,
            t_last_ns=4 * 10**9, t_done_ns=5 * 10**9, n_out=3, count_source="usage",
            chunk_t_ns=[2 * 10**9, 4 * 10**9], scores={"exact_match": 1.0}, output=FORMULA,
            details={"é": [1]},
        ),
        Request(arm="a", index=1, error_class="http_429", http_status=429, error='a "b",\nc'),
    ]  # fmt: skip
    return Run(make_run("x1", rows=rows))


def test_export_json_and_csv_say_the_same(exported: Run, tmp_path: Path) -> None:
    text = export.export(exported, "json", None)
    assert text is not None
    one, two = json.loads(text)
    assert (one["ttft_s"], one["tpot_s"], one["e2e_from_due_s"]) == (1.0, 1.0, 5.0)
    assert (one["score.exact_match"], two["score.exact_match"]) == (1.0, None)
    assert (one["ok"], two["ok"]) == (True, False)
    assert export.export(exported, "csv", tmp_path / "x.csv") is None
    with (tmp_path / "x.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == list(one)
    assert first["ttft_s"] == "1.0"
    assert json.loads(first["chunk_t_ns"]) == one["chunk_t_ns"]
    assert second["error"] == two["error"]
    assert second["ttft_s"] == ""
    assert first["output"] == "'" + FORMULA, "a spreadsheet must not run it"


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "=\r=1", '=",1'])
def test_no_text_is_a_formula_in_csv(make_run: MakeRun, text: str) -> None:
    run = Run(make_run(rows=[Request(output=text)]))
    told = export.export(run, "csv", None)
    (read,) = csv.DictReader(io.StringIO(str(told), newline=""))
    assert read["output"] == "'" + text


def test_a_warm_up_counts_nowhere(make_run: MakeRun) -> None:
    warm = Request(t_sent_ns=0, t_done_ns=9, phase="warmup")
    failed = Request(phase="warmup", error_class="http_500")
    rows = [Request(t_sent_ns=0, t_done_ns=9), warm, failed]
    figures = Run(make_run(rows=rows)).figures()
    assert figures is not None
    (group,) = figures.figures["groups"]
    assert (group["num_requests"], group["num_not_steady"], group["num_ok"]) == (1, 2, 1)
    assert (group["errors"], group["e2e_s"]["n"]) == ({}, 1)


def test_export_parquet(exported: Run, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    export.export(exported, "parquet", path)
    table = parquet.read_table(path)
    assert table.schema.field("t_sent_ns").type == pyarrow.int64()
    assert table.schema.field("ttft_s").type == pyarrow.float64()
    one, two = table.to_pylist()
    text = export.export(exported, "json", None)
    assert text is not None
    expected = json.loads(text)
    assert one | {"details": None} == expected[0] | {"details": None}
    assert json.loads(one["details"]) == {"é": [1]}
    assert two["http_status"] == 429
    with pytest.raises(ConfigError, match="needs a file"):
        export.export(exported, "parquet", None)


def test_export_of_no_rows(make_run: MakeRun, tmp_path: Path) -> None:
    empty = Run(make_run("x1", rows=[]))
    assert export.export(empty, "json", None) == "[]\n"
    assert str(export.export(empty, "csv", None)).startswith("run_id,started_at,arm,")
    export.export(empty, "parquet", tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="cannot be written"):
        export.export(empty, "csv", tmp_path / "no" / "x.csv")


def test_export_command(exported: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["export", "x1"])
    assert done.stdout.startswith("run_id,")
    for suffix in ("csv", "json", "parquet"):
        path = tmp_path / f"rows.{suffix}"
        assert CliRunner().invoke(command, ["export", "x1", "-o", str(path)]).exit_code == 0
        assert path.stat().st_size > 100
    assert json.loads((tmp_path / "rows.json").read_text())


def test_show_makes_tables() -> None:
    part = {"n": 3, "p50": 0.05, "max": None}
    figures = {"ttft_s": part, "e2e_s": part, "rss_bytes": 2**30, "odd": {}, "errors": {"cut": 1}}
    told = list(show.lines(figures))
    assert told == [
        "        n      p50  max",
        "ttft_s  3  50.0 ms    —",
        "e2e_s   3  50.0 ms    —",
        f"{'rss_bytes':<24} 1.00 GiB",
        f"{'odd':<24} —",
        "errors",
        f"  {'cut':<24} 1",
    ]
    narrow = list(show.lines(figures, width=20))
    assert narrow[:2] == ["ttft_s", f"  {'n':<24} 3"]
    assert show.cell("a\x1b[31mb\nc") == "a\ufffd[31mb c", "a terminal must not obey it"


def test_show_command(make_run: MakeRun) -> None:
    make_run("x1")
    done = CliRunner().invoke(command, ["show", "x1"], standalone_mode=False)
    assert done.return_value == 0
    assert "time to first token, p50    50.0 ms" in done.stdout
    assert "ttft_visible_s" not in done.output, "not everything"
    done = CliRunner().invoke(command, ["show", "x1", "--all"], standalone_mode=False)
    assert "ttft_visible_s" in done.output
    told = json.loads(CliRunner().invoke(command, ["show", "x1", "--json"]).output)
    assert told["figures"]["figures"]["groups"][0]["num_ok"] == 20
    make_run("y1", finish=False)
    done = CliRunner().invoke(command, ["show", "y1"], standalone_mode=False)
    assert done.return_value == 3

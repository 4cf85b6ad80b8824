"""A changed byte of the records, a changed figure, header or page: found, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli.verify import command
from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.environment import hash_file
from penstock.measure.records import Arm
from penstock.measure.run import FIGURES, HEADER, PAGE, RECORDS
from penstock.measure.verify import compare, verify

MakeRun = Callable[..., Path]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def test_a_run_as_it_was_written(make_run: MakeRun) -> None:
    found = verify(make_run())
    assert found.ok
    assert found.records_unchanged
    assert found.header_unchanged
    assert found.page == "equal"
    assert found.num_values > 50
    assert not found.mismatches


def test_every_changed_byte_of_the_records_is_found(make_run: MakeRun) -> None:
    path = make_run()
    whole = (path / RECORDS).read_bytes()
    for place in range(0, len(whole), 97):
        changed = bytearray(whole)
        changed[place] ^= 1
        (path / RECORDS).write_bytes(changed)
        try:
            found = verify(path)
        except ConfigError:
            continue  # the line is damaged, which is told with its number
        assert not found.ok
        assert found.records_unchanged is False


def test_what_a_changed_record_does_is_named(make_run: MakeRun) -> None:
    path = make_run()
    records = (path / RECORDS).read_bytes()
    slower = records.replace(b'"t_done_ns":100000000', b'"t_done_ns":900000000', 1)
    assert slower != records
    (path / RECORDS).write_bytes(slower)
    found = verify(path)
    names = {wrong.path for wrong in found.mismatches}
    assert "figures.groups[0].e2e_s.max" in names
    assert not any("ttft_s" in name for name in names)


@pytest.mark.parametrize(
    ("change", "path", "stored"),
    [
        (
            lambda f: f["figures"]["groups"][0]["ttft_s"].update(p50=0.01),
            "groups[0].ttft_s.p50",
            0.01,
        ),
        (lambda f: f["figures"]["groups"][0].update(num_ok=20.0), "groups[0].num_ok", 20.0),
        (lambda f: f["figures"]["groups"][0].pop("e2e_s"), "groups[0].e2e_s", None),
        (lambda f: f["figures"].update(better=1), "better", 1),
    ],
)
def test_a_changed_figure_is_named(
    make_run: MakeRun, change: Callable[[Any], None], path: str, stored: Any
) -> None:
    run = make_run()
    edit(run / FIGURES, change)
    found = verify(run)
    assert not found.ok
    (wrong,) = found.mismatches
    assert wrong.path == f"figures.{path}"
    assert wrong.stored == stored
    assert wrong.recomputed != stored or type(wrong.recomputed) is not type(stored)


def test_a_problem_that_was_taken_out_is_found(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / FIGURES, lambda figures: figures.update(problems=["none, really"]))
    (wrong,) = verify(run).mismatches
    assert (wrong.path, wrong.only_in) == ("problems[0]", "stored")


def test_a_changed_header_or_page_is_found(make_run: MakeRun) -> None:
    run = make_run()
    header = (run / HEADER).read_bytes()
    (run / HEADER).write_bytes(header.replace(b"llama", b"lhama"))
    found = verify(run)
    assert found.header_unchanged is False
    assert not found.ok
    (run / HEADER).write_bytes(header)
    assert verify(run).ok
    page = (run / PAGE).read_text()
    (run / PAGE).write_text(page.replace("50.0", "40.0"))
    found = verify(run)
    assert found.page == "differs"
    assert not found.ok
    (run / PAGE).unlink()
    found = verify(run)
    assert found.page == "not here"
    assert found.ok, "a page can be made again"


def test_a_header_whose_hash_was_taken_out_is_not_good(make_run: MakeRun) -> None:
    run = make_run()
    header = (run / HEADER).read_bytes()
    (run / HEADER).write_bytes(header.replace(b"http://h", b"http://x"))
    edit(run / FIGURES, lambda figures: figures.pop("header_sha256"))
    found = verify(run)
    assert found.header_unchanged is False
    assert not found.ok


def test_what_was_put_beside_the_figures_is_found(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / FIGURES, lambda figures: figures.update(verdict="better"))
    (wrong,) = verify(run).mismatches
    assert (wrong.path, wrong.stored, wrong.only_in) == ("verdict", "better", "stored")


def test_a_page_is_compared_by_its_bytes(make_run: MakeRun) -> None:
    run = make_run(arms=[Arm(name="a\rb\r\nc", target="http://h", model="m")])
    assert verify(run).ok
    page = (run / PAGE).read_bytes()
    for changed in (page.replace(b"\r", b"\n"), page + b"\xff"):
        assert changed != page
        (run / PAGE).write_bytes(changed)
        assert verify(run).page == "differs"


def test_records_of_which_nothing_can_be_computed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()

    def compute(*_: object) -> None:
        raise KeyError("a mark that was taken out")

    monkeypatch.setattr(kinds, "compute", compute)
    found = verify(run)
    assert not found.ok
    (wrong,) = found.mismatches
    assert wrong.path == "figures"
    assert "not computed: KeyError" in wrong.recomputed


def test_files_that_the_header_names(make_run: MakeRun, tmp_path: Path) -> None:
    same, changed = tmp_path / "same.jsonl", tmp_path / "changed.jsonl"
    for path in (same, changed):
        path.write_text("prompts")
    run = make_run(
        hashes={str(same): hash_file(same), "prompts": hash_file(changed), "gone": "00"},
        settings={"files": {"prompts": str(changed)}, "format": "x"},
    )
    changed.write_text("other prompts")
    found = verify(run)
    assert found.files == {str(same): "unchanged", "prompts": "changed", "gone": "not here"}
    assert found.ok, "the figures follow from the records all the same"


def test_a_run_that_was_stopped(make_run: MakeRun) -> None:
    run = make_run(finish=False)
    with (run / RECORDS).open("ab") as file:
        file.write(b'{"type":"request","ind')
    found = verify(run)
    assert not found.ok
    assert not found.finished
    assert found.num_records == 20
    assert any("cut off" in note for note in found.notes)
    assert any("not yet made" in note for note in found.notes)
    found = verify(run, finish=True)
    assert found.ok
    assert (run / PAGE).exists()


def test_records_that_were_taken_away(make_run: MakeRun) -> None:
    run = make_run()
    (run / RECORDS).unlink()
    found = verify(run)
    assert not found.ok
    assert any("There is no `records.jsonl`" in note for note in found.notes)


def test_command(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    runner = CliRunner()
    done = runner.invoke(command, ["20261122T10"], standalone_mode=False)
    assert done.return_value == 0
    assert done.output.splitlines()[-1] == "verified"
    edit(run / FIGURES, lambda f: f["figures"]["groups"][0]["ttft_s"].update(p50=0.01))
    done = runner.invoke(command, [str(run)], standalone_mode=False)
    assert done.return_value == 4
    assert "figures.groups[0].ttft_s.p50: stored 0.01, computed 0.05" in done.output
    assert done.output.splitlines()[-1] == "NOT verified"
    done = runner.invoke(command, [str(run), "--json"], standalone_mode=False)
    told = json.loads(done.output)
    assert told["ok"] is False
    assert told["mismatches"][0]["recomputed"] == pytest.approx(0.05)
    (run / FIGURES).unlink()
    done = runner.invoke(command, [str(run)], standalone_mode=False)
    assert done.return_value == 3
    assert "penstock verify --finish" in done.output
    assert runner.invoke(command, [str(run), "--finish"], standalone_mode=False).return_value == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_a_value_of_nothing_is_not_a_value_that_is_missing() -> None:
    found = list(compare({"a": None, "l": [1, None]}, {"b": None, "l": [1]}))
    assert [(wrong.path, wrong.only_in) for wrong in found] == [
        ("a", "stored"),
        ("l[1]", "stored"),
        ("b", "recomputed"),
    ]


@given(a=JSON, b=JSON)
def test_compare_finds_a_difference_just_where_json_differs(a: Any, b: Any) -> None:
    assert not list(compare(a, a))
    assert list(compare(0.0, -0.0))
    a, b = (msgspec.json.decode(msgspec.json.encode(value)) for value in (a, b))
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert bool(list(compare(a, b))) == (not same)

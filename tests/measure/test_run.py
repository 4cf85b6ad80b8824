"""Records come back as they were written, also from a process that was killed in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.measure import metrics
from penstock.measure.records import Arm, Header, Mark, Request, Sample
from penstock.measure.run import RECORDS, Run, Writer

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: "Infinity" not in repr(value) and "inf" not in repr(value))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NS = st.none() | st.integers(-(2**62), 2**62)
REQUESTS = st.builds(
    Request,
    arm=st.text(),
    stage=st.text(),
    phase=st.sampled_from(["warmup", "ramp", "steady", "drain"]),
    index=st.integers(0, 2**40),
    t_due_ns=NS,
    t_sent_ns=NS,
    t_first_ns=NS,
    t_done_ns=NS,
    chunk_t_ns=st.lists(st.integers(0, 2**62), max_size=4),
    chunk_n=st.lists(st.integers(0, 9), max_size=4),
    n_out=st.none() | st.integers(0, 2**40),
    count_source=st.sampled_from(["usage", "tokenizer", "chunks", "none"]),
    error_class=st.none() | st.text(),
    error=st.none() | st.text(),
    output=st.none() | st.text(),
    scores=st.dictionaries(st.text(), NUMBERS, max_size=3),
    details=st.dictionaries(st.text(), JSON, max_size=3),
    usd=st.none() | NUMBERS,
)
SAMPLES = st.builds(
    Sample,
    t_ns=st.integers(-(2**62), 2**62),
    arm=st.text(),
    source=st.text(),
    values=st.dictionaries(st.text(), NUMBERS, max_size=3),
)
MARKS = st.builds(
    Mark,
    t_ns=st.integers(-(2**62), 2**62),
    name=st.text(),
    facts=st.dictionaries(st.text(), JSON, max_size=3),
)


def header(**more: Any) -> Header:
    told = {"run_id": "r", "kind": "import", "started_at": "2026-11-22T00:00:00Z", "version": "0"}
    return Header(**(told | more))


@settings(max_examples=50)
@given(records=st.lists(REQUESTS | SAMPLES | MARKS, max_size=6))
def test_records_round_trip(records: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run")
    with Writer(header(arms=[Arm(name="a", target="t")]), path) as writer:
        for record in records:
            writer.add(record)
    run = Run(path)
    assert run.records == records
    assert run.requests == [record for record in records if isinstance(record, Request)]
    assert run.header.arms == [Arm(name="a", target="t")]


WRITES = """
import sys
from pathlib import Path
from penstock.measure.records import Header, Request
from penstock.measure.run import Writer
header = Header(run_id="r", kind="import", started_at="2026", version="0")
writer = Writer(header, Path(sys.argv[1]))
for index in range(10**9):
    writer.add(Request(index=index, output="x" * (index % 5000)))
    if index == 200:
        print("go", flush=True)
"""


def test_what_is_killed_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    rows = Run(path).requests
    assert len(rows) > 200
    assert [row.index for row in rows] == list(range(len(rows)))


def test_a_cut_line_is_left_out_and_a_damaged_one_told(tmp_path: Path) -> None:
    with Writer(header(), tmp_path / "run") as writer:
        for index in range(3):
            writer.add(Request(index=index))
    records = tmp_path / "run" / RECORDS
    whole = records.read_bytes()
    for cut in range(len(whole)):
        records.write_bytes(whole[:cut])
        found = Run(tmp_path / "run").requests
        assert [row.index for row in found] == list(range(whole[:cut].count(b"\n")))
    records.write_bytes(whole.replace(b'"index":1', b'"index":"one"'))
    with pytest.raises(ConfigError, match=r"Line `2` of .* is damaged"):
        Run(tmp_path / "run")


def test_one_directory_holds_one_run(tmp_path: Path) -> None:
    with Writer(header(), tmp_path):
        pass
    with pytest.raises(ConfigError, match="holds a run already"):
        Writer(header(), tmp_path)
    with pytest.raises(ConfigError, match=r"has no `run\.json`: it is no run"):
        Run(tmp_path / "nothing")


def test_a_record_of_an_unknown_field_is_still_read() -> None:
    """A newer version may add fields; what this one knows of a record it can use."""
    line = b'{"type":"request","index":3,"from_the_future":1}'
    assert msgspec.json.decode(line, type=Request).index == 3


@given(
    values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40),
    q=st.floats(0, 1) | st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_quantiles_are_those_of_numpy(values: list[float], q: float) -> None:
    import numpy

    assert metrics.quantile(values, q) == pytest.approx(
        numpy.quantile(values, q), rel=1e-9, abs=1e-6
    )


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from penstock.measure.records import Header, Request
from penstock.measure.run import RECORDS, Writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
with Writer(Header(run_id="r", kind="bench", started_at="", version=""), path) as writer:
    writer.add(Request(prompt_id="first"))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, ((path / RECORDS).stat().st_size + 20, hard))
    try:
        writer.add(Request(prompt_id="second" * 9))
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        writer.add(Request(prompt_id="third"))
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True, timeout=60)
    assert [row.prompt_id for row in Run(tmp_path / "run").requests] == ["first", "third"]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    header = Header(run_id="r", kind="eval", started_at="", version="")
    with Writer(header, tmp_path / "run") as writer:
        row = Request(scores={"nan": float("nan"), "good": 0.5})
        writer.add(row)
        writer.add(Sample(t_ns=1, source="s", values={"inf": float("inf"), "good": 1.0}))
    assert len(row.scores) == 2  # the caller's row stays as it is
    first, second = Run(tmp_path / "run").records
    assert isinstance(first, Request)
    assert isinstance(second, Sample)
    assert first.scores == {"good": 0.5}
    assert second.values == {"good": 1.0}


def test_an_answer_in_one_piece_has_no_time_between_tokens() -> None:
    row = Request(n_out=20, count_source="usage", t_sent_ns=0, t_first_ns=5, t_last_ns=5)
    assert metrics.tpot_s(row) is None
    row.t_last_ns = 5 + 19 * 10**9
    assert metrics.tpot_s(row) == pytest.approx(1)

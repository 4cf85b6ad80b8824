"""Traces: the real files whole, our own log as the server writes it, and bad lines by name."""

from __future__ import annotations

import csv
import json
import logging
from datetime import datetime
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.load import traces
from penstock.server.calls import Call, _log_fields
from penstock.server.logs import JsonFormatter

MOONCAKE = [
    {"timestamp": 27000, "input_length": 1100, "output_length": 9, "hash_ids": [7, 8, 9]},
    {"timestamp": 30500, "input_length": 600, "output_length": 0, "hash_ids": [7, 10]},
    {"timestamp": 30500, "input_length": 5, "output_length": 2, "hash_ids": [11]},
]


def written(path: Path, *lines: object) -> Path:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return path


@pytest.mark.parametrize(("name", "num"), [("conv", 19366), ("code", 8819)])
def test_all_rows_of_azures_traces(data_dir: Path, name: str, num: int) -> None:
    path = data_dir / "traces-azure-llm-2023" / f"AzureLLMInferenceTrace_{name}.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num
    arrivals = traces.read(path)
    assert [arrival.num_in for arrival in arrivals] == [int(row["ContextTokens"]) for row in rows]
    assert [arrival.num_out for arrival in arrivals] == [
        int(row["GeneratedTokens"]) for row in rows
    ]
    begin = datetime.fromisoformat(rows[0]["TIMESTAMP"])
    for arrival, row in zip(arrivals, rows, strict=True):
        offset = datetime.fromisoformat(row["TIMESTAMP"]) - begin  # to a microsecond
        assert arrival.due_s == pytest.approx(offset.total_seconds(), abs=2e-6)


def test_azures_tenths_of_a_microsecond(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2024-05-12 00:00:00+00:00,1,2",
    )
    first, second = traces.read(path)
    assert first == traces.Arrival(due_s=0.0, num_in=4808, num_out=10)
    assert second.due_s == pytest.approx((178 * 24 - 18) * 3600 - 17 * 60 - 3.97996, abs=1e-5)


def test_mooncake(tmp_path: Path) -> None:
    trace = traces.read_trace(written(tmp_path / "m.jsonl", *MOONCAKE))
    assert (trace.kind, trace.num_skipped) == ("mooncake", 0)
    assert [arrival.due_s for arrival in trace.arrivals] == [0.0, 3.5, 3.5]
    assert [arrival.prefix_blocks for arrival in trace.arrivals] == [(7, 8, 9), (7, 10), (11,)]
    assert [arrival.num_out for arrival in trace.arrivals] == [9, 0, 2]


def log_line(
    path: str, *, ended_s: float, duration_s: float, tokens: tuple[int, int] | None
) -> str:
    """A request as the server logs it."""
    call = Call("request-1", "POST", path)
    call.status = 200 if tokens else 429
    if tokens:
        call.num_answers, call.user = 1, "digest"
        call.num_prompt_tokens, call.num_completion_tokens = tokens
    record = logging.makeLogRecord({"name": "penstock.server", "msg": "request"})
    record.created = ended_s
    vars(record).update(_log_fields(call) | {"duration_s": duration_s})
    return JsonFormatter().format(record)


def test_the_log_that_our_server_writes(tmp_path: Path) -> None:
    """A request is logged when it ends, so a long one may stand behind one that came later."""
    path = written(
        tmp_path / "server.log",
        '{"time": "2026-01-01T00:00:00.000+00:00", "level": "info", "message": "listening"}',
        log_line("/v1/completions", ended_s=102.0, duration_s=0.5, tokens=(20, 3)),
        log_line("/v1/chat/completions", ended_s=103.0, duration_s=2.0, tokens=(30, 5)),
        log_line("/v1/chat/completions", ended_s=104.0, duration_s=0.0, tokens=None),
    )
    trace = traces.read_trace(path)
    assert trace.kind == "penstock"
    assert trace.num_skipped == 2  # what is no request, and what was refused
    assert [(one.due_s, one.num_in, one.num_out, one.session) for one in trace.arrivals] == [
        (0.0, 30, 5, "digest"),
        (0.5, 20, 3, "digest"),
    ]


def test_a_log_that_keeps_texts_is_replayed_word_for_word(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = written(
        tmp_path / "gateway.jsonl",
        {"time": "2026-01-01T00:00:00Z", "prompt": "Say: hi", "completion_tokens": 4},
        {"time": "2026-01-01T00:00:02.25Z", "messages": messages, "duration_s": 1},
    )
    first, second = traces.read(path)
    assert (first.prompt, first.num_in, first.num_out) == ("Say: hi", None, 4)
    assert (second.messages, second.due_s, second.num_out) == (messages, 1.25, None)


@pytest.mark.parametrize(
    ("kind", "line", "told"),
    [
        ("azure", "2023-11-16 18:17:04,1", "columns"),
        ("azure", "yesterday,1,2", "`TIMESTAMP` is `yesterday`"),
        ("azure", "2023-13-16 18:17:04,1,2", "`TIMESTAMP`"),
        ("azure", "2023-11-16 18:17:04,many,2", "`ContextTokens` is `many`"),
        ("azure", "2023-11-16 18:17:04,1,-2", "`GeneratedTokens` is `-2`"),
        ("mooncake", "{", "no JSON"),
        ("mooncake", "[1]", "no JSON object"),
        ("mooncake", '{"timestamp": "1", "input_length": 1, "output_length": 1}', "`timestamp`"),
        ("mooncake", '{"timestamp": 1, "input_length": 1.5, "output_length": 1}', "`input_length`"),
        (
            "mooncake",
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1, 2]}',
            "`hash_ids` has `2` blocks",
        ),
        ("penstock", '{"message": "request", "prompt_tokens": 5}', "`time` is `None`"),
        ("penstock", '{"time": "2026-01-01T00:00:00Z", "prompt": 5}', "`prompt`"),
        ("penstock", '{"time": "2026-01-01T00:00:00Z", "messages": ["x"]}', "`messages`"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, kind: str, line: str, told: str) -> None:
    good = {
        "azure": "TIMESTAMP,ContextTokens,GeneratedTokens",
        "mooncake": json.dumps(MOONCAKE[0]),
        "penstock": '{"time": "2026-01-01T00:00:00Z", "prompt": "x"}',
    }[kind]
    path = written(tmp_path / "trace", good, line)
    with pytest.raises(ConfigError) as error:
        traces.read(path, kind)
    assert f"`{path}`, line `2`" in error.value.message
    assert told in error.value.message


def test_what_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trace that is known"):
        traces.read(written(tmp_path / "t", "a,b,c"))
    with pytest.raises(ConfigError, match="cannot be read"):
        traces.read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no request"):
        traces.read(written(tmp_path / "t", "TIMESTAMP,ContextTokens,GeneratedTokens"))

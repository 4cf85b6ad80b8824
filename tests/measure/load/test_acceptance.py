"""What a load test has to get right, against a server that really delays, stalls and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_target import asks, writer_at
from scripted_server import Scripted

from penstock.measure.kinds import finish
from penstock.measure.load.driver import Loaded, Windows, open_loop
from penstock.measure.load.endpoint import Endpoint
from penstock.measure.load.figures import load_figures
from penstock.measure.load.slo import parse
from penstock.measure.load.target import Ask
from penstock.measure.run import Run

CLI = [sys.executable, "-m", "penstock.cli.main", "bench"]


async def loaded(
    server: Scripted, path: Path, due_s: list[float], prompts: list[Ask], **more: Any
) -> Loaded:
    target = Endpoint(server.url, model="scripted", probe=False, dialect="openai-completions")
    try:
        with writer_at(path) as writer:
            return await open_loop(target, prompts, due_s, writer=writer, **more)
    finally:
        await target.close()


@pytest.mark.anyio
async def test_a_stall_is_in_the_latency_from_due_and_hidden_from_sending(
    scripted_server: Scripted, tmp_path: Path
) -> None:
    """Coordinated omission: a client with two places asks hardly anyone while the server stalls.

    Of 300 requests in 3 s, 150 are due in the 1.5 s of the stall, fewer if the client is late to
    begin; two are on the wire.
    """
    scripted_server.configure(ttft_s=0.001, tpot_s=0.0005, num_tokens=2)
    due_s = [n / 100 for n in range(300)]
    scripted_server.stall(after_s=1.0, duration_s=1.5)
    found = await loaded(scripted_server, tmp_path, due_s, asks(300), max_concurrency=2)
    latency = load_figures(found.rows, found.marks)["latency"]
    assert latency["e2e_from_due_s"]["n"] == 300
    assert latency["e2e_from_due_s"]["p99"] > 0.8
    assert latency["e2e_s"]["p99"] < 0.5
    assert latency["e2e_s"]["max"] > 0.8  # who was on the wire


@pytest.mark.anyio
async def test_four_tokens_a_chunk_leave_tokens_per_second(
    scripted_server: Scripted, tmp_path: Path
) -> None:
    found = {}
    due_s = [n / 20 for n in range(24)]
    prompts = [
        Ask(prompt_id=str(n), prompt=f"p {n}", max_tokens=40, fixed_length=True) for n in range(24)
    ]
    for packed in (1, 4):
        scripted_server.configure(ttft_s=0.01, tpot_s=0.005, tokens_per_chunk=packed)
        stage = await loaded(
            scripted_server,
            tmp_path / str(packed),
            due_s,
            prompts,
            windows=Windows(ramp_s=0.3, steady_s=0.8),
        )
        found[packed] = load_figures(stage.rows, stage.marks)
    assert {row.n_chunks for row in stage.rows} == {10}
    rates = [found[packed]["tokens"]["output_per_s"] for packed in (1, 4)]
    assert rates[1] == pytest.approx(rates[0], rel=0.1)
    tpots = [found[packed]["latency"]["tpot_s"]["p50"] for packed in (1, 4)]
    assert tpots[1] == pytest.approx(tpots[0], rel=0.25)


@pytest.mark.anyio
async def test_a_burst_of_refusals_is_counted(scripted_server: Scripted, tmp_path: Path) -> None:
    fail = {"status": 429, "retry_after_s": 1, "begin_s": 0.2, "end_s": 0.5}
    scripted_server.configure(ttft_s=0.005, tpot_s=0.001, num_tokens=4, fail=fail)
    due_s = [n / 100 for n in range(80)]
    found = await loaded(scripted_server, tmp_path, due_s, asks(80))
    figures = load_figures(found.rows, found.marks, limits=parse("e2e=1s,error_rate=1%"))
    refused = sum(row.http_status == 429 for row in found.rows)
    assert 15 <= refused <= 45
    assert figures["requests"]["errors"] == {"http_429": refused}
    assert figures["requests"]["num_ok"] == 80 - refused
    assert figures["latency"]["e2e_s"]["n"] == 80 - refused
    assert figures["goodput"]["num_bad"] == refused
    assert figures["slo"][0]["kept"] is False
    assert any(f"{refused} of 80 requests failed" in note for note in figures["notes"])


def started(server: Scripted, path: Path, *options: str) -> subprocess.Popen[str]:
    """A bench that would last for a minute; returns when it has finished some requests."""
    command = [*CLI, server.url, "--request-rate", "40", "--duration", "60", "--ramp", "0"]
    command += ["--num-warmups", "1", "--random-input-len", "8", "--random-output-len", "4"]
    process = subprocess.Popen(
        [*command, "--output", str(path), "--meter-interval", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PENSTOCK_DATA": ""},
    )
    deadline_s = time.monotonic() + 30
    records = path / "records.jsonl"
    while not records.exists() or records.read_bytes().count(b'"stage":"load"') < 12:
        assert time.monotonic() < deadline_s
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def test_what_was_finished_survives_a_kill(scripted_server: Scripted, tmp_path: Path) -> None:
    scripted_server.configure(ttft_s=0.005, tpot_s=0.001)
    process = started(scripted_server, tmp_path / "run")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    rows = [row for row in Run(tmp_path / "run").requests if row.stage == "load"]
    assert len(rows) >= 8
    assert all(row.ok and row.n_out == 4 for row in rows)
    made = finish(tmp_path / "run")  # figures can still be made
    assert "interrupted" in made.problems[0]
    assert made.figures["stages"][0]["requests"]["num_ok"] == len(rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_control_c_ends_with_figures_of_what_is_there(
    scripted_server: Scripted, tmp_path: Path, number: signal.Signals
) -> None:
    scripted_server.configure(ttft_s=0.005, tpot_s=0.2)
    process = started(scripted_server, tmp_path / "run", "--json")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    figures = json.loads(out)["figures"]["stages"][0]
    assert figures["requests"]["num_ok"] > 0
    assert figures["requests"]["num_cut"] > 0
    assert "interrupted" in json.loads(out)["problems"][0]
    assert (tmp_path / "run" / "report.html").exists()

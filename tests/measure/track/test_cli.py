"""`penstock track` against a server that really answers and fails, in processes of their own."""

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
from scripted_server import Scripted

CONFIG = """
database = "{database}"
[schedule]
every = "1d"
[probe]
input_tokens = [20]
output_tokens = [4]
concurrency = [1, 2]
pause_s = 0
first_token_samples = 1
timeout_s = 20
[[provider]]
name = "here"
url = "{url}"
[[provider.model]]
name = "scripted"
"""


@pytest.fixture
def config(tmp_path: Path, scripted_server: Scripted) -> Path:
    path = tmp_path / "track.toml"
    database = tmp_path / "track.sqlite"
    path.write_text(CONFIG.format(database=database, url=scripted_server.url))
    return path


def penstock(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done


def shown(config: Path) -> dict[str, Any]:
    found = json.loads(penstock("track", "show", str(config), "--json").stdout)
    series: dict[str, Any] = found["series"]["here/scripted"]
    return series


def test_probe_show_export_verify(config: Path, scripted_server: Scripted, tmp_path: Path) -> None:
    scripted_server.configure(
        ttft_s=0.05, fail={"status": 429, "retry_after_s": 1, "every": 5}, cached_tokens=3
    )
    checked = json.loads(penstock("track", "check", str(config), "--json").stdout)
    assert checked["requests_per_series_and_slot"] == {
        "speed": 3,
        "canaries": 8,
        "first_tokens": 8,
    }
    penstock("track", "run", str(config), "--now")
    series = shown(config)
    assert series["slots"] == {"done": 1}
    assert series["num_rate_limited"] == 4  # of 20, the warm-up among them
    assert series["errors"] == {"http_429": 4}
    cell = series["cells"][0]
    assert cell["ttft_s"]["p50"] >= 0.05
    assert cell["measured_output_tokens"] == 4

    run = tmp_path / "run"
    penstock("track", "export", str(config), "-o", str(run))
    penstock("verify", str(run))
    text = penstock("track", "show", str(config)).stdout
    assert "here/scripted" in text
    assert "http_429 4" in text


def test_killed_in_the_middle(config: Path, scripted_server: Scripted) -> None:
    scripted_server.configure(ttft_s=0.2)
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli.main", "track", "run", str(config), "--now"]
    )
    deadline_s = time.monotonic() + 30
    while len(scripted_server.log()) < 4:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = shown(config)
    assert before["slots"] == {"running": 1}
    assert before["num_ok"] >= 2
    scripted_server.configure(ttft_s=0.0, tpot_s=0.0)
    time.sleep(1.1)  # the next slot is a second of its own
    penstock("track", "run", str(config), "--now")
    after = shown(config)
    assert after["slots"] == {"done": 1, "interrupted": 1}
    assert after["num_ok"] == before["num_ok"] + 20


def test_nobody_there(config: Path) -> None:
    text = config.read_text()
    begin = text.index('url = "')
    end = text.index("\n", begin)
    config.write_text(text[:begin] + 'url = "http://127.0.0.1:9"' + text[end:])
    done = penstock("track", "run", str(config), "--now")
    assert "failed" in done.stderr
    assert shown(config)["slots"] == {"failed": 1}


def test_bad_file(config: Path) -> None:
    config.write_text(config.read_text().replace("every", "evry"))
    done = penstock("track", "run", str(config), status=1)
    assert "evry" in done.stderr
    assert "Traceback" not in done.stderr

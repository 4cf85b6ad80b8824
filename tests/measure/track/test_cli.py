"""`penstock track` against a server that really answers and fails, in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Scripted

from penstock.measure.records import Request
from penstock.measure.track.tables import Book
from penstock.storage.database import open_database

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


def start_and_stop(config: Path, server: Scripted, how: signal.Signals) -> int:
    """End a tracker in the middle of a slot; its status."""
    server.configure(ttft_s=0.2)
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli.main", "track", "run", str(config), "--now"],
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 30
    while len(server.log()) < 4:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(how)
    return process.wait(30)


def test_stopped_in_the_middle(config: Path, scripted_server: Scripted) -> None:
    assert start_and_stop(config, scripted_server, signal.SIGTERM) == 130
    series = shown(config)
    assert series["slots"] == {"interrupted": 1}
    assert series["errors"]["cut"] >= 1


def test_killed_in_the_middle(config: Path, scripted_server: Scripted) -> None:
    assert start_and_stop(config, scripted_server, signal.SIGKILL) == -signal.SIGKILL
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
    done = penstock("track", "run", str(config), "--now", "--json")
    assert "slot failed before a request was sent" in json.loads(done.stdout)["message"]
    assert shown(config)["slots"] == {"failed": 1}
    lines = penstock("track", "show", str(config)).stdout.splitlines()
    assert lines[1].split()[0] == "here/scripted"
    assert "0.0%" in lines[1]
    assert lines[-1] == "Drift: not enough slots yet to compare a series with its reference."


def test_who_reads_makes_no_database(config: Path, tmp_path: Path) -> None:
    database = tmp_path / "track.sqlite"
    for command in ("show", "export"):
        done = penstock("track", command, str(config), status=1)
        assert f"There is no database `{database}`." in done.stderr
        assert not database.exists()
    database.touch()
    done = penstock("track", "show", str(config), status=1)
    assert "holds nothing of a tracker" in done.stderr
    Book(open_database(str(database))).close()
    run = tmp_path / "run"
    done = penstock("track", "export", str(config), "-o", str(run), status=1)
    assert "no slot in this time" in done.stderr
    assert not run.exists()
    assert "No slot yet" in penstock("track", "show", str(config)).stdout


def test_a_directory_that_is_not_there_is_not_made(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "nodir" / "x.sqlite"
    done = penstock("track", "run", str(config), "--now", "--database", str(path), status=1)
    assert "its directory is not there" in done.stderr
    assert not path.parent.exists()


def test_bad_file(config: Path) -> None:
    config.write_text(config.read_text().replace("every", "evry"))
    done = penstock("track", "run", str(config), status=2)
    assert "evry" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_that_say_nothing_together_are_refused(config: Path) -> None:
    done = penstock("track", "run", str(config), "--now", "--slots", "2", status=2)
    assert "--now and --slots" in done.stderr


def test_a_key_that_is_missing_is_told_at_once(config: Path) -> None:
    text = config.read_text().replace('name = "here"', 'name = "here"\napi_key_env = "NO_SUCH"')
    config.write_text(text)
    done = penstock("track", "run", str(config), "--now", status=2)
    assert "`NO_SUCH`" in done.stderr
    assert "Traceback" not in done.stderr


def test_strict_is_a_status(tmp_path: Path) -> None:
    """A model that was exchanged, in a database from elsewhere."""
    path = tmp_path / "track.toml"
    alarm = "[alarm]\nwindow_slots = 6\nreference_slots = 6\n[[provider]]"
    text = CONFIG.format(database="t.sqlite", url="http://127.0.0.1:9")
    path.write_text(text.replace("[[provider]]", alarm, 1))
    book = Book(open_database(str(tmp_path / "t.sqlite")))
    today = int(time.time()) // 86400 * 86400
    for day in range(12):
        for canary in range(8):
            slot_id = book.open_slot("here/scripted", today - 86400 * (11 - day), {})
            slot_id = slot_id or day + 1
            output = "old" if day < 6 or canary < 2 else "new"
            hashed = str(canary)
            row = Request(arm="here/scripted", task="canary", prompt_hash=hashed, output=output)
            row.t_done_ns = 1
            book.add(slot_id, row)
    book.close()
    arguments = ("track", "show", str(path), "--days", "5")
    assert "own first slots: ALARM" in penstock(*arguments, "--strict", status=4).stdout
    path.write_text(path.read_text().replace("[alarm]", "[alarm]\nfalse_alarms_per_year = 1e-30"))
    penstock(*arguments, "--strict", "--json", status=0)

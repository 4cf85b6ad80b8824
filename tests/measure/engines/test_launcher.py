"""Engines are started, waited for, and ended with all that they started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.errors import ConfigError, PenstockError
from penstock.measure.engines.arms import parse_arm
from penstock.measure.engines.launcher import launched
from penstock.measure.engines.process import EngineFailed
from penstock.measure.load.target import Ask
from penstock.measure.records import Clock, Request

pytestmark = pytest.mark.anyio


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def variables_of(pid: int | None) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def pids_of(note: Path) -> list[int]:
    return list(json.loads(note.read_text())["pids"])


async def test_an_engine_that_is_ready_answers_and_is_gone_afterwards(tmp_path: Path) -> None:
    note = tmp_path / "note"
    spec = parse_arm(f"x=fake:some/model?note={note}&delay_s=0.3&precision=int7")
    async with launched(spec, log_dir=tmp_path) as running:
        assert running.pid is not None
        assert is_running(running.pid)
        row, clock = Request(), Clock()
        ask = Ask(prompt_id="1", prompt=[1, 2, 3], max_tokens=5, fixed_length=True)
        reply = await running.target.ask(ask, row, clock)
        assert reply is not None
        assert reply.text == "a " * 5
        assert (row.n_in, row.n_out, row.count_source) == (3, 5, "usage")
        assert (running.arm.name, running.arm.engine, running.arm.model) == ("x", "fake", "model")
        assert running.arm.precision == "int7"
        told = running.startup
        assert list(told) == ["port_s", "ready_s", "first_token_s", "total_s"]
        assert told["port_s"] >= 0.3
        assert told["total_s"] == pytest.approx(sum(told.values()) / 2)
        assert running.first is not None
        assert running.first.n_out == 2
        assert running.first.stage == "startup"
    assert not is_running(running.pid)
    assert not any(is_running(pid) for pid in pids_of(note))
    assert "fake_engine.py --model some/model" in (tmp_path / "x.log").read_text()


async def test_an_engine_that_dies_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed) as caught:
        async with launched(parse_arm("fake:m?mode=dies"), log_dir=tmp_path):
            pass
    assert caught.value.message == "The engine `fake` ended with status 3 while it started."
    assert caught.value.hint is not None
    assert "no such weights" in caught.value.hint


@pytest.mark.parametrize("mode", ["silent", "closed"])
async def test_an_engine_that_is_never_ready_is_ended(tmp_path: Path, mode: str) -> None:
    note = tmp_path / "note"
    spec = parse_arm(f"fake:m?mode={mode}&note={note}&ready_timeout_s=0.8")
    with pytest.raises(EngineFailed, match=r"not ready in 0\.8 s"):
        async with launched(spec, log_dir=tmp_path):
            pass
    assert not any(is_running(pid) for pid in pids_of(note))


async def test_an_engine_that_cannot_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="out of order"):
        async with launched(parse_arm("fake:m?mode=mute"), log_dir=tmp_path):
            pass


async def test_an_engine_is_ended_when_the_block_raises_or_is_cancelled(tmp_path: Path) -> None:
    note = tmp_path / "note"
    spec = parse_arm(f"fake:m?note={note}")
    with pytest.raises(ZeroDivisionError):
        async with launched(spec, log_dir=tmp_path) as running:
            raise ZeroDivisionError
    assert running.pid is not None
    assert not is_running(running.pid)

    begun = asyncio.Event()

    async def hold() -> int:
        async with launched(spec, log_dir=tmp_path) as running:
            assert running.pid is not None
            pids.append(running.pid)
            begun.set()
            await asyncio.sleep(60)
        return 0

    pids: list[int] = []
    task = asyncio.create_task(hold())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(is_running(pid) for pid in pids + pids_of(note))


async def test_an_engine_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.measure.engines.process._TERMINATE_S", 0.2)
    note = tmp_path / "note"
    async with launched(
        parse_arm(f"fake:m?mode=stubborn&note={note}"), log_dir=tmp_path
    ) as running:
        pass
    assert running.pid is not None
    assert not any(is_running(pid) for pid in [running.pid, *pids_of(note)])


def test_a_killed_measurement_leaves_no_engine(tmp_path: Path) -> None:
    """SIGKILL gives no block a chance to end: the system tells the engine."""
    code = (
        "import sys; from pathlib import Path\n"
        "from penstock.measure.engines.process import EngineProcess\n"
        "import time\n"
        "p = EngineProcess('sleep', ['sleep', '600'], {}, Path(sys.argv[1]))\n"
        "print(p.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        os.kill(process.pid, signal.SIGKILL)
    for _ in range(200):
        if not is_running(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the engine outlived the measurement")


async def test_what_is_not_installed_or_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`/no/such/engine` is no program"):
        async with launched(parse_arm("fake:m?executable=/no/such/engine"), log_dir=tmp_path):
            pass
    with pytest.raises(ConfigError, match="must be a number"):
        async with launched(parse_arm("fake:m?ready_timeout_s=soon"), log_dir=tmp_path):
            pass
    with pytest.raises(PenstockError):
        async with launched(parse_arm("http://127.0.0.1:9/v1"), log_dir=tmp_path):
            pass


async def test_a_started_engine_gets_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PENSTOCK_API_KEY", "MY_PROVIDER_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "kept")
    async with launched(parse_arm("fake:m"), log_dir=tmp_path) as running:
        told = variables_of(running.pid)
    assert b"hunter2" not in told
    assert b"TOKENIZERS_PARALLELISM=kept" in told


@pytest.mark.skipif(sys.platform != "linux", reason="variables of other processes are not read")
async def test_children_of_an_engine_that_died_do_not_outlive_it(tmp_path: Path) -> None:
    """They are in a session of their own, and have no parent any more."""
    note = tmp_path / "note"
    with pytest.raises(EngineFailed, match="ended with status 3"):
        async with launched(parse_arm(f"fake:m?mode=dies&note={note}"), log_dir=tmp_path):
            pass
    assert not any(is_running(pid) for pid in pids_of(note))

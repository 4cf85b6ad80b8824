"""What only the engine in a process of its own has: framing, signals, sudden deaths."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvloop
from helpers_fake_core import EXIT, tokens_of
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock.engine import client as client_module
from penstock.engine import process
from penstock.engine.config import EngineConfig
from penstock.engine.process import ProcessClient
from penstock.errors import ConfigError, EngineDead, InvalidField
from penstock.native import library
from penstock.protocol.frames import Frames, frame
from penstock.types import EngineRequest, SamplingParams

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def child_path(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(penstock.__file__).parent.parent  # the child tests what the test imports
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(source), str(HERE)]))


def make_client(model: str = "fake") -> ProcessClient:
    return ProcessClient(EngineConfig(model=model), core="helpers_fake_core:make")


async def collect(
    client: ProcessClient, request_id: str, prompt: list[int], n: int | None
) -> list[int]:
    params = SamplingParams(max_tokens=n)
    request = EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)
    return [i async for event in client.generate(request) for i in event.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the client has no event for its figures
            await asyncio.sleep(0.001)


def state_of(pid: int) -> str:
    """One letter: R running, S sleeping, T stopped, Z zombie or gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(1, 40)))
def test_frames_come_out_as_they_went_in(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame(message) for message in messages)
    frames, found, start = Frames(), [], 0
    for size in [*cuts, len(stream)]:
        found += frames.feed(stream[start : start + size])
        start += size
    assert [frame_of(payload) for payload in found] == [frame(message) for message in messages]


def frame_of(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "little") + payload


@pytest.mark.parametrize("sudden", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_child_ends_every_request_with_the_cause(
    sudden: signal.Signals, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(client_module.logger, "propagate", False)

    async def main() -> None:
        client = make_client()
        await client.start()
        tasks = [asyncio.create_task(collect(client, f"r{i}", [i], None)) for i in range(50)]
        await until(lambda: client.stats.num_running == 50)
        os.kill(client.pid, sudden)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, EngineDead) for error in errors)
        assert all(f"`{sudden.name}`" in str(error) for error in errors)
        assert sudden.name in str(client.dead)
        with pytest.raises(EngineDead, match=sudden.name):
            await collect(client, "late", [1], 1)
        await client.shutdown()
        assert sudden.name in str(client.dead)  # the first cause stays

    asyncio.run(main())
    (told,) = caplog.records  # once, and not that it was shut down behind that
    assert (told.levelname, sudden.name in told.message) == ("ERROR", True)


def test_an_exit_names_the_code(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        client = make_client()
        await client.start()
        with pytest.raises(EngineDead, match=r"exit code `7`") as caught:
            await collect(client, "a", [EXIT], 1)
        assert "about to exit" not in str(caught.value)  # it may be another's prompt
        await client.shutdown()

    asyncio.run(main())
    assert "about to exit" in capfd.readouterr().err


# A request may be made without a look at its types: here by whoever writes them afterwards.
UNREADABLE: list[tuple[str, object]] = [
    ("prompt_token_ids", ["x"]),
    ("prompt_token_ids", [True]),
    ("prompt_token_ids", [1.0]),
    ("prompt_token_ids", 5),
    ("priority", "x"),
    ("salt", None),
    ("logit_bias", {1: True}),
    ("ignore_eos", 1),
    ("stop", "END"),
    ("max_tokens", "5"),
]
UNSENDABLE: list[tuple[str, object]] = [
    ("prompt_token_ids", [2**70]),
    ("prompt_token_ids", [np.int64(3)]),
    ("prompt_token_ids", np.array([3])),
    ("priority", 2**70),
    ("salt", "\ud800"),
    ("min_tokens", 2**70),
]


@pytest.mark.parametrize("wrong", [UNREADABLE, UNSENDABLE], ids=["unreadable", "unsendable"])
def test_a_malformed_request_is_refused_and_others_go_on(wrong: list[tuple[str, object]]) -> None:
    async def main() -> None:
        client = make_client()
        await client.start()
        other = asyncio.create_task(collect(client, "other", [5], 500))
        await until(lambda: client.stats.num_running == 1)
        for name, value in wrong:
            params = SamplingParams(max_tokens=2)
            request = EngineRequest(request_id="a", prompt_token_ids=[1], params=params)
            owner = params if hasattr(params, name) else request
            object.__setattr__(owner, name, value)
            with pytest.raises(InvalidField, match="cannot be sent") as caught:
                async for _ in client.generate(request):
                    pass
            assert caught.value.field == name
        assert await other == tokens_of([5], 500)
        assert await collect(client, "a", [6], 3) == tokens_of([6], 3)
        assert client.dead is None
        await client.shutdown()

    asyncio.run(main())


def test_a_message_that_names_no_request_ends_the_child_with_a_cause(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def main() -> None:
        client = make_client()
        await client.start()
        task = asyncio.create_task(collect(client, "a", [5], None))
        await until(lambda: client.stats.num_running == 1)
        assert client._transport is not None
        client._transport.write(frame({"type": "Nonsense"}))
        with pytest.raises(EngineDead, match="exit code `1`"):
            await task
        await client.shutdown()

    asyncio.run(main())
    assert "The engine cannot read what it is told." in capfd.readouterr().err


def test_a_child_that_ends_while_loading() -> None:
    async def main() -> None:
        client = make_client("exits")
        with pytest.raises(EngineDead, match=r"exit code `3`(?s:.*)out of luck"):
            await client.start()
        await client.shutdown()

    asyncio.run(main())


def test_an_unknown_error_while_loading() -> None:
    async def main() -> None:
        client = make_client("raises")
        with pytest.raises(EngineDead, match="`RuntimeError` in `make`"):
            await client.start()
        await client.shutdown()

    asyncio.run(main())


def test_a_name_that_no_message_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is started"))
    with pytest.raises(ConfigError, match=r"`mod\\udce8le` is not UTF-8"):
        make_client(os.fsdecode(b"mod\xe8le"))


def test_shutdown_while_loading_ends_the_child() -> None:
    async def main() -> None:
        client = make_client("hangs")
        task = asyncio.create_task(client.start())
        await asyncio.sleep(0.3)
        await client.shutdown()
        with pytest.raises(EngineDead):
            await task
        assert client._child.process.returncode == 0  # it was not killed

    asyncio.run(main())


def test_shutdown_kills_a_child_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.engine.process._EXIT_S", 0.2)

    async def main() -> None:
        client = make_client()
        await client.start()
        os.kill(client.pid, signal.SIGSTOP)
        await until(lambda: state_of(client.pid) == "T")
        await client.shutdown()
        assert client._child.process.wait(30) == -signal.SIGKILL

    asyncio.run(main())


def test_ctrl_c_and_sigterm_leave_the_child_to_its_parent() -> None:
    async def main() -> None:
        client = make_client()
        await client.start()
        assert os.getpgid(client.pid) != os.getpgid(0)
        assert os.getsid(client.pid) != os.getsid(0)
        task = asyncio.create_task(collect(client, "a", [5], 200))
        await until(lambda: client.stats.num_running == 1)
        os.kill(client.pid, signal.SIGINT)
        os.kill(client.pid, signal.SIGTERM)
        assert await task == tokens_of([5], 200)
        await client.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize("model", ["fake", "hangs"])
def test_the_child_ends_with_its_parent(model: str) -> None:
    program = f"""
import asyncio, time
from penstock.engine.config import EngineConfig
from penstock.engine.process import ProcessClient
client = ProcessClient(EngineConfig(model={model!r}), core="helpers_fake_core:make")
async def main():
    if {model!r} == "fake":
        await client.start()
    print(client.pid, flush=True)
    time.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert state_of(pid) != "Z"
        parent.kill()
    deadline = time.monotonic() + 20
    while state_of(pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(pid) == "Z"


def test_the_child_does_not_import_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        client = make_client()
        await client.start()
        await client.shutdown()

    asyncio.run(main())


def test_startup_phases_include_the_process() -> None:
    async def main() -> None:
        client = make_client()
        await client.start()
        assert set(client.info.startup_s) == {"process", "load"}
        assert 0 < client.info.startup_s["process"] < 30
        await client.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize(("backend", "told"), [("auto", "1"), ("native", "1"), ("torch", "None")])
@pytest.mark.parametrize("given", [None, "3"])
def test_numpy_has_one_thread_where_torch_needs_none(
    backend: str, told: str, given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has a library of that name of its own on some machines; what the user says holds."""
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    (tmp_path / "probe.py").write_text(
        "import os, sys\nfrom penstock.errors import ConfigError\n"
        "def make(config):\n"
        "    assert 'numpy' not in sys.modules, 'it would have started its threads'\n"
        "    raise ConfigError(str(os.environ.get('OPENBLAS_NUM_THREADS')))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)

    async def main() -> None:
        client = ProcessClient(EngineConfig(model="m", backend=backend), core="probe:make")
        with pytest.raises(ConfigError, match=f"^{given or told}$"):
            await client.start()
        await client.shutdown()

    asyncio.run(main())


def test_a_terminal_without_a_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose /dev/pts is not the one of the terminal."""

    def no_name(fd: int) -> str:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    monkeypatch.delenv("PENSTOCK_TERMINAL", raising=False)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(os, "ttyname", no_name)
    assert process._environment() == dict(os.environ)
    monkeypatch.setattr(os, "ttyname", lambda fd: f"/dev/pts/{fd}")
    assert process._environment()["PENSTOCK_TERMINAL"] == "/dev/pts/2"


def test_it_runs_on_uvloop() -> None:
    async def main() -> None:
        client = make_client()
        await client.start()
        assert await collect(client, "a", [5, 6], 20) == tokens_of([5, 6], 20)
        task = asyncio.create_task(collect(client, "b", [5], None))
        await until(lambda: client.stats.num_running == 1)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="`SIGKILL`"):
            await task
        await client.shutdown()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())

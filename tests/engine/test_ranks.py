"""Ranks follow rank 0 step by step, and end with it and with one another; never a hang."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers_ranks import INTERRUPT, RAISE, UNMET, VOCAB, token_of
from helpers_tiny import run
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.engine.plan import Admission, Slice, StepPlan
from penstock.engine.ranks import RankedRunner, _undisturbed, encoded, make_ranked_runner
from penstock.errors import ConfigError, EngineDead, WeightMismatch
from penstock.types import EngineInfo, EngineRequest, SamplingParams

pytestmark = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 4, reason="every rank needs a GPU of its own"
)

HERE = Path(__file__).parent
MAX_MODEL_LEN = 48
NUM_BLOCKS = 26


@pytest.fixture(autouse=True)
def child_path(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(penstock.__file__).parent.parent  # the ranks test what the test imports
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(source), str(HERE)]))


def start(size: int, model: str = "fake", timeout_s: float = 60.0) -> RankedRunner:
    return make_ranked_runner(
        Path(model),
        settings(size),
        NUM_BLOCKS,
        (),
        {},
        make="helpers_ranks:make",
        timeout_s=timeout_s,
    )


def settings(size: int) -> EngineConfig:
    return EngineConfig(
        model="fake",
        max_model_len=MAX_MODEL_LEN,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=10,
        tensor_parallel_size=size,
    )


def core_of(runner: RankedRunner, size: int) -> EngineCore:
    info = EngineInfo(
        model="fake",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB,
        eos_token_ids=(),
        dtype="float32",
        block_size=4,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=4,
    )
    runner.launch(StepPlan([], [], [0, 1, 2, 3], []))  # an earlier core may have left them taken
    return EngineCore(settings(size), info, runner)


def request(name: str, prompt: list[int], max_tokens: int = 20) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, stop=("\ud800",)),  # no message can hold it
    )


def answer(prompt: list[int], num_tokens: int, size: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(token_of(token_ids, size))
    return token_ids[len(prompt) :]


def step_on(core: EngineCore) -> None:
    for _ in range(1000):
        core.step()


def pids_of(runner: RankedRunner) -> list[int]:
    """Of all ranks but the first."""
    return [rank.process.pid for rank in runner._peers._ranks]


def state_of(pid: int) -> str:
    """One letter: R running, S sleeping, T stopped, Z zombie; empty: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


@pytest.fixture(scope="module")
def three() -> Iterator[RankedRunner]:
    with pytest.MonkeyPatch.context() as patch:
        child_path.__wrapped__(patch)  # type: ignore[attr-defined]
        runner = start(3)
    yield runner
    runner.close()


def test_tokens_need_every_rank(three: RankedRunner) -> None:
    core = core_of(three, 3)
    prompts = {f"r{i}": [(7 * i + j) % VOCAB for j in range(3 + 5 * i)] for i in range(5)}
    requests = [request(name, prompt) for name, prompt in prompts.items()]
    outputs = run(core, requests, arrivals={"r3": 2, "r4": 5}, aborts={"r1": 4})
    assert core.stats.num_preemptions > 0
    assert core.stats.num_chunks > 0
    for name, prompt in prompts.items():
        found = outputs[name].token_ids
        assert found == answer(prompt, 20, 3)[: len(found)]
        assert len(found) == 20 or name == "r1"
    assert three.description == "fake"
    assert three.depth == 1


def test_ctrl_c_waits_for_the_launch_and_all_go_on(three: RankedRunner) -> None:
    core = core_of(three, 3)
    core.add(request("a", [INTERRUPT]))
    with pytest.raises(KeyboardInterrupt):
        step_on(core)
    core.abort("a")
    outputs = run(core, [request("b", [1, 2, 3])])
    assert outputs["b"].token_ids == answer([1, 2, 3], 20, 3)


def test_a_killed_rank_ends_all_with_the_cause(three: RankedRunner) -> None:
    """Last of those that share these ranks."""
    core, pids = core_of(three, 3), pids_of(three)
    core.add(request("a", [5], 40))
    core.step()
    core.check()
    started_s = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EngineDead, match="Rank `2` was killed by `SIGKILL`"):
        step_on(core)
    assert time.monotonic() - started_s < 5
    for stays_so in (core.check, lambda: three.launch(StepPlan([], [], [], []))):
        with pytest.raises(EngineDead, match="Rank `2` was killed"):
            stays_so()
    directory = three._peers._directory
    three.close()
    assert [state_of(pid) for pid in pids] == ["", ""]
    assert not directory.exists()


def test_a_rank_that_fails_in_a_step(capfd: pytest.CaptureFixture[str]) -> None:
    runner = start(2)
    core = core_of(runner, 2)
    core.add(request("a", [RAISE]))
    with pytest.raises(EngineDead, match="Rank `1` stopped with `RuntimeError` in `launch`") as e:
        step_on(core)
    assert "prompt" not in str(e.value)
    runner.close()
    assert "rank 1: RuntimeError: a prompt" in capfd.readouterr().err


def test_a_rank_that_does_not_answer() -> None:
    """Then only time tells; a rank that was killed would have closed its connections."""
    runner = start(2)
    core = core_of(runner, 2)
    core.add(request("a", [5], 40))
    core.step()
    runner._peers._timeout_s = 1.0
    (pid,) = pids_of(runner)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineDead, match="The ranks did not end a step in `1` s"):
        step_on(core)
    runner.close()
    assert state_of(pid) == ""


@pytest.mark.parametrize(
    ("model", "error", "told"),
    [
        ("misfits", WeightMismatch, "`1` weights do not fit"),
        ("exits", EngineDead, r"Rank `1` ended with exit code `3`(?s:.*)out of luck"),
        ("loses", EngineDead, "A rank lost the others"),
        ("garbles", EngineDead, "The watcher of the ranks stopped with `ValidationError`"),
    ],
)
def test_a_rank_that_fails_while_loading(
    model: str, error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.engine.peers._CAUSE_S", 0.5)
    started_s = time.monotonic()
    with pytest.raises(error, match=told) as caught:
        start(2, model)
    assert time.monotonic() - started_s < 20
    if error is WeightMismatch:
        assert caught.value.hint == "look"  # type: ignore[attr-defined]


def test_a_rank_that_leaves_a_child_behind() -> None:
    """Which keeps its output open; nobody waits for the end of that."""
    started_s = time.monotonic()
    with pytest.raises(EngineDead, match=r"Rank `1` ended with exit code `3`") as caught:
        start(2, "leaves")
    assert time.monotonic() - started_s < 10
    left = re.search(r"left (\d+)", str(caught.value))
    assert left, "its last words are told none the less"
    os.kill(int(left[1]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("unmet", "told"),
    [
        ("no device", "Rank `1` stopped with `RuntimeError` in `fail`"),
        ("fails", "Rank `1` stopped with `RuntimeError` in `fail`"),
        ("dies", "Rank `1` was killed by `SIGKILL`"),
    ],
)
def test_a_rank_that_ends_while_the_ranks_meet(
    unmet: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for it in torch then, which notices nothing."""
    with monkeypatch.context() as patch:
        patch.setenv(UNMET, unmet)
        started_s = time.monotonic()
        with pytest.raises(EngineDead, match=told):
            start(2, timeout_s=30.0)
        assert time.monotonic() - started_s < 15
    start(2).close()  # whoever waits there still does not stop others


def test_ranks_that_cannot_be_started_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    popen, started = subprocess.Popen, []

    def only_one(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(popen(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", only_one)
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
        start(3)
    assert started[0].returncode is not None
    assert not list(tmp_path.iterdir())


def test_a_path_that_no_message_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`mod\\udce8le` is not UTF-8"):
        start(2, os.fsdecode(b"mod\xe8le"))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_undisturbed_is_what_it_was_before() -> None:
    """In a process of its own: with the default action it ends."""
    program = """
import os, signal, sys
from penstock.engine.ranks import _undisturbed
def press():
    with _undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        print("launched", flush=True)
heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
press()
assert heard == [signal.SIGINT]
signal.signal(signal.SIGINT, signal.SIG_IGN)
press()
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
signal.signal(signal.SIGINT, signal.SIG_DFL)
press()
print("not here")
"""
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False)
    assert found.returncode == -signal.SIGINT
    assert found.stdout.split() == [b"launched"] * 3


def test_a_handler_of_c_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python cannot put it back."""
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *args: installed.append(args))
    with _undisturbed():
        pass
    assert not installed


def test_the_ranks_end_when_nobody_has_the_runner() -> None:
    runner = start(2)
    (pid,), directory = pids_of(runner), runner._peers._directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700  # where they met
    del runner
    gc.collect()
    assert state_of(pid) == ""
    assert not directory.exists()


def test_the_ranks_end_with_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they do: here they load."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from penstock.engine import peers, ranks
from penstock.engine.config import EngineConfig
meet = peers.Peers.meet
def meet_and_tell(self):
    group = meet(self)
    print(self._ranks[0].process.pid, flush=True)
    return group
peers.Peers.meet = meet_and_tell
config = EngineConfig(model="fake", max_model_len=48, tensor_parallel_size=2)
ranks.make_ranked_runner(Path("sleeps"), config, 10, (), {{}}, make="helpers_ranks:make")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert state_of(pid) not in {"", "Z"}
        assert list(tmp_path.iterdir())
        parent.kill()
    deadline_s = time.monotonic() + 10
    while state_of(pid) not in {"", "Z"} and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert state_of(pid) in {"", "Z"}
    assert not list(tmp_path.iterdir())


token_ids = st.integers(0, 2**31 - 1)
params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_k=token_ids,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.none() | st.dictionaries(token_ids, st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=1, max_size=3),
    banned_token_ids=st.lists(token_ids, max_size=3),
    stop_token_ids=st.lists(token_ids, max_size=3),
    ignore_eos=st.booleans(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 1000),
    prompt_logprobs=st.none() | st.integers(0, 1000),
)
rows = st.integers(0, 1000)
admissions = st.builds(
    Admission,
    rows,
    st.lists(token_ids, max_size=20),
    st.integers(0, 20),
    params,
    st.integers(-(2**63), 2**63 - 1),
)
plans = st.builds(
    StepPlan,
    st.lists(st.builds(Slice, rows, token_ids, token_ids), max_size=5),
    st.lists(admissions, max_size=3),
    st.lists(rows, max_size=5),
    st.lists(st.tuples(rows, st.lists(token_ids, max_size=5)), max_size=5),
)


@given(plans)
def test_a_plan_arrives_as_it_was_sent(plan: StepPlan) -> None:
    message = encoded(plan)
    arrived = msgspec.msgpack.decode(message[4:], type=StepPlan)
    assert arrived == plan
    assert repr(arrived) == repr(plan)  # also -0.0, and every type
    assert encoded(arrived) == message


def test_the_text_of_a_request_stays_here() -> None:
    admission = Admission(0, [1], 1, SamplingParams(stop=("\ud800",), top_k=3), 5)
    arrived = msgspec.msgpack.decode(encoded(StepPlan([], [admission], [], []))[4:], type=StepPlan)
    assert arrived.admitted == [admission._replace(params=SamplingParams(top_k=3))]

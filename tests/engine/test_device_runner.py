"""The engine on a device answers what a naive loop answers, with steps in flight and without.

Without a GPU the references in plain torch compute, on the CPU: what is proven there is the order
of things, the tables, the padding and the graphs' tensors, not the kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_interrupted
import torch
from helpers_tiny import Oracle, TinyModel, run
from helpers_waits import WouldWait, no_wait
from test_engine_exact import BASES, EVENTS, play, stress

from penstock.engine.core import EngineCore
from penstock.models.graphs import DecodeGraphs
from penstock.types import EngineRequest, SamplingParams

pytestmark = pytest.mark.usefixtures("references")


@pytest.mark.parametrize(
    ("depth", "enforce_eager", "max_examples"),
    [(1, False, 20), (1, True, 5), (0, False, 5), (0, True, 5)],  # beside those that are certain
)
def test_tokens_equal_the_naive_loop(
    checkpoint: Path, oracle: Oracle, depth: int, enforce_eager: bool, max_examples: int
) -> None:
    tiny = TinyModel(checkpoint, backend="triton", depth=depth, enforce_eager=enforce_eager)
    totals = play(tiny, oracle, max_examples)
    for event in EVENTS:
        assert totals[event] > 0, event
    assert (totals["in_flight"] > 0) == (depth > 0)


def test_a_step_in_flight_changes_no_token(checkpoint: Path) -> None:
    """Nor does a graph: preempted, chunked, drawn and aborted requests, token by token."""
    scenario = stress(block_size=3, num_blocks=16)
    found = []
    for depth, enforce_eager in ((0, True), (0, False), (1, True), (1, False)):
        tiny = TinyModel(checkpoint, backend="triton", depth=depth, enforce_eager=enforce_eager)
        core = tiny.core(**scenario.settings)
        outputs = run(core, scenario.requests, arrivals=scenario.arrivals)
        found.append({name: output.token_ids for name, output in outputs.items()})
        assert core.stats.num_preemptions > 0
    assert found[0] == found[1] == found[2] == found[3]


def test_cut_anywhere_with_a_step_in_flight(checkpoint: Path, oracle: Oracle) -> None:
    tiny = TinyModel(checkpoint, backend="triton", depth=1)
    test_interrupted.test_cut_at_every_layer_of_every_step(tiny, oracle)


def test_steps_of_more_rows_than_any_graph_are_eager(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With graphs up to two rows, three requests decode eagerly, and when one ends, as a graph."""
    replayed: list[int] = []
    replay = DecodeGraphs.replay

    def counted(self: DecodeGraphs, padded: list[Any]) -> torch.Tensor:
        replayed.append(len(padded[0]))
        return replay(self, padded)

    monkeypatch.setattr(DecodeGraphs, "replay", counted)
    asked = [replace(one, params=replace(one.params, max_tokens=8)) for one in requests(12)[:2]]
    asked.append(requests(12)[2])
    found = {}
    for limit in (512, 2, 0):  # 0: no graphs
        monkeypatch.setattr("penstock.models.device_footprint.MAX_GRAPH_ROWS", limit or 512)
        tiny = TinyModel(checkpoint, backend="triton", depth=1, enforce_eager=not limit)
        core = tiny.core(block_size=3, num_blocks=64)
        replayed.clear()
        found[limit] = {name: out.token_ids for name, out in run(core, asked).items()}
        if limit == 2:
            assert set(replayed) == {1}, "rows that were two or less"
        else:
            assert (max(replayed, default=0) > 2) == (limit == 512)
    assert found[512] == found[2] == found[0]
    assert len(found[2]["2"]) == 12


# -- nobody waits --------------------------------------------------------------------------------


def requests(max_tokens: int) -> list[EngineRequest]:
    """What most people ask for: the most likely token, or one that is drawn."""
    asked = [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5, "min_p": 0.1}]
    return [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=BASES[0][: 5 + index],
            params=SamplingParams(
                **{"temperature": 0.0, **some}, seed=index, max_tokens=max_tokens, ignore_eos=True
            ),
        )
        for index, some in enumerate(asked)
    ]


def launch_next(core: EngineCore, guard: Callable[[], AbstractContextManager[object]]) -> None:
    """A step of `core`, whose launch alone is in the guard."""
    plan = core.scheduler.schedule()
    with guard():
        step = core._runner.launch(plan)
    core._in_flight.append((plan, step))
    if len(core._in_flight) > core._runner.depth:
        oldest, step = core._in_flight.popleft()
        core.scheduler.commit(oldest, step.read())


def test_a_steady_step_waits_for_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what the device computes: what a graph holds, and the kernel that samples."""
    core = TinyModel(checkpoint, backend="triton", depth=1).core(block_size=3, num_blocks=64)
    runner: Any = core._runner
    for request in requests(24):
        core.add(request)
    for _ in range(2):
        launch_next(core, nullcontext)
    steps = runner._graphs._steps
    steps.update({size: (batch, lambda: None) for size, (batch, _) in steps.items()})

    def choose(*args: Any, **settings: Any) -> None:
        args[8].zero_()

    monkeypatch.setattr("penstock.sampling.device.sample", choose)
    num_blocks = core.stats.num_used_blocks
    for _ in range(8):
        launch_next(core, no_wait)
    assert core.stats.num_used_blocks > num_blocks  # new blocks are no reason to wait


def test_the_tripwire_trips() -> None:
    x = torch.arange(3)
    for wait in (
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x[1].item(),
        lambda: int(x[1]),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: "yes" if x.sum() > 1 else "no",
    ):
        with no_wait(), pytest.raises(WouldWait):
            wait()


@pytest.mark.gpu
def test_a_steady_step_waits_for_nothing_on_a_gpu(checkpoint: Path) -> None:
    @contextmanager
    def no_sync() -> Iterator[None]:
        with warnings.catch_warnings():  # it is a prototype, as torch says each time
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for enforce_eager in (False, True):
        tiny = TinyModel(checkpoint, backend="triton", depth=1, enforce_eager=enforce_eager)
        core = tiny.core(block_size=3, num_blocks=64)
        for request in requests(24):
            core.add(request)
        for _ in range(4):
            launch_next(core, nullcontext)
        for _ in range(12):
            launch_next(core, no_sync)

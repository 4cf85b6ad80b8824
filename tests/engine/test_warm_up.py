"""What runs before the first request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.engine.build import warm_up
from penstock.engine.config import EngineConfig
from penstock.engine.device_runner import DeviceRunner
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.runner import Done
from penstock.engine.state import DeviceState
from penstock.sampling.device import DeviceSampler


class Noted:
    """Implements `Runner` as far as a warm-up goes: applies plans, computes nothing."""

    depth = 0
    description = "noted"

    def __init__(self, config: EngineConfig) -> None:
        size = config.max_num_seqs, config.context_len, config.block_size
        self.state = DeviceState(*size)
        self.plans: list[StepPlan] = []
        self.num_read = 0

    def check(self) -> None:
        """Nothing can have happened."""

    def launch(self, plan: StepPlan) -> Done:
        self.plans.append(plan)
        self.state.apply(plan)
        for row, start, length in plan.slices:
            held = int(self.state.num_blocks[row]) * self.state.block_size
            assert start + length <= min(held, self.state.token_ids.shape[1])
            if start + length == self.state.num_tokens[row]:
                self.state.num_tokens[row] += 1
        return Done(StepResult({}, {}, {}))


@pytest.mark.parametrize(
    ("utilization", "max_num_batched_tokens", "max_model_len", "expected"),
    [
        (0.9, 2048, 4096, [(0, 2048), (0, 2), (2048, 1)]),
        (0.9, 2048, 100, [(0, 99), (0, 2)]),
        (0.9, 2, 100, [(0, 2), (2, 1)]),
        (0.9, 8, 2, [(0, 1)]),
        (None, 2048, 4096, [(0, 8), (8, 1)]),
        (None, 5, 4096, [(0, 5), (5, 1)]),
    ],
)
def test_steps(
    utilization: float | None,
    max_num_batched_tokens: int,
    max_model_len: int,
    expected: list[tuple[int, int]],
) -> None:
    """On a GPU the longest first, so that smaller ones find its memory."""
    config = EngineConfig(
        model="",
        gpu_memory_utilization=utilization,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_num_seqs=1,
        block_size=16,
    )
    runner, phases = Noted(config), dict[str, float]()
    warm_up(runner, config, phases)
    slices = [(start, length) for plan in runner.plans for _, start, length in plan.slices]
    assert slices == expected
    assert runner.plans[-1].released == [0], "the row is free again"
    assert list(phases) == ["warmup"]


def test_the_sampler_warms_up_with_logits_as_the_model_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks that share an odd vocabulary give rows with a gap between them."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(DeviceSampler, "warm_up", lambda sampler, logits: found.append(logits))

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.shape == (1, 8)
        return torch.zeros(1, 112, dtype=hidden.dtype)[:, :101]

    model: Any = SimpleNamespace(
        spec=SimpleNamespace(vocab_size=101, hidden_size=8),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        kv=SimpleNamespace(dummy_block=3),
        logits=logits,
    )
    DeviceRunner(model, DeviceState(2, 32, 16), (), depth=0, enforce_eager=True)
    assert [(one.dtype, one.shape, one.stride(0)) for one in found] == [
        (torch.bfloat16, (1, 101), 112)
    ]

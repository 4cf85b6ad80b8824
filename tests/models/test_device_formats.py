"""Checkpoints that are published in codes, on the triton backend: numbers of the model's dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models.device_helpers import DeviceSessions, Threads, load_device
from tests.models.helpers import Sessions, load
from tests.models.test_formats import SHAPE, Logits, joined, written
from tests.models.test_parity import full, ragged

from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.layers import device_materials
from penstock.models import load as load_module
from penstock.parallel.group import Group

pytestmark = pytest.mark.usefixtures("references")

NAMES = [
    "GPTQ 4 bits asym 128",
    "AWQ",
    "W4A16 sym",
    "W8A8",
    "fp8 DeepSeek",
    "fp8 channel",
    "nf4",
    "GGUF Q4_K_M",
]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded some rows at a time, of one rank and of the shares of two."""
    monkeypatch.setattr(device_materials, "_DECODED_AT_ONCE", 7 * SHAPE.hidden_size)
    path, twin = written(name, tmp_path)
    expected = joined(Sessions(load(twin), block_size=16), full)

    def of_rank(group: Group) -> Logits:
        return joined(DeviceSessions(load_device(path, group=group)), ragged)

    for found in [*Threads(1).run(of_rank), *Threads(2).run(of_rank)]:
        for row, wanted in expected.items():
            assert wanted.std() > 0.1
            bound = 1e-4 * max(1.0, wanted.std().item())
            assert (found[row] - wanted).abs().max() < bound


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("GPTQ 4 bits asym 128", "GPTQ, 4 bits in groups of 128, held"),
        ("GGUF Q4_K_M", "GGUF, Q6_K and Q4_K"),
    ],
)
def test_the_plan_says_what_the_codes_become(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "has_nvidia_device", lambda: False)
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    path, _ = written(name, tmp_path)
    config = EngineConfig(
        model=str(path), backend="triton", max_num_seqs=2, num_blocks=40, dtype="bfloat16"
    )
    plan = EngineCore.from_config(config).info.plan
    (weights,) = (line for line in plan if line.startswith("weights"))
    assert told in weights
    assert weights.endswith("held in bfloat16")

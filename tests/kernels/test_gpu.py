"""What is said of the GPUs of a machine, and of a driver that fails."""

from __future__ import annotations

import warnings

import pytest
import torch

from penstock.kernels import gpu
from penstock.kernels.jit import triton


def test_without_a_gpu_every_rank_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.gpus() == []
    assert gpu.device(3) == torch.device("cpu")


def test_a_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert gpu.device(3) == torch.device("cuda", 3)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_a_gpu_that_torch_cannot_use_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = gpu.Gpu("NVIDIA H200", 141 * 2**30, (9, 0))
    t4 = gpu.Gpu("Tesla T4", 15 * 2**30, (7, 5))
    a100 = gpu.Gpu("NVIDIA A100", 80 * 2**30, (8, 0))
    monkeypatch.setattr("torch.version.cuda", None)
    assert "is built without CUDA" in str(gpu.problem())
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr(gpu, "gpus", lambda: [h200, t4])
    assert gpu.problem() == "`Tesla T4` has compute capability 7.5; 8.0 is needed"
    monkeypatch.setattr(gpu, "gpus", lambda: [h200, a100])
    assert gpu.problem() is None
    assert gpu.fp8_problem() == "`NVIDIA A100` has compute capability 8.0; fp8 needs 8.9"
    monkeypatch.setattr(gpu, "gpus", lambda: [h200])
    assert gpu.fp8_problem() is None

    def broken() -> list[gpu.Gpu]:
        warnings.warn("CUDA initialization: The NVIDIA driver is too old.\nUpdate", stacklevel=1)
        return []

    monkeypatch.setattr(gpu, "gpus", broken)
    told = str(gpu.problem())
    assert told.endswith("that it can use: CUDA initialization: The NVIDIA driver is too old")

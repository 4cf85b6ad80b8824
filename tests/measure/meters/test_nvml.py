"""NVML: units, what a GPU does not tell, and no driver. A GPU itself only where there is one."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.measure.meters import nvml
from penstock.measure.meters.sampler import Meters


class FakePynvml:
    """The functions that are called, for a T4 that has all and a card that knows its power only."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, num_gpus: int = 2, has_driver: bool = True) -> None:
        self.num_gpus, self.has_driver = num_gpus, has_driver

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return "Tesla T4" if handle == 0 else b"Old Card"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self._only_first(handle)
        return 123_456

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 70_500

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        self._only_first(handle)
        return SimpleNamespace(used=2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self._only_first(handle)
        return SimpleNamespace(gpu=25)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        self._only_first(handle)
        known = SimpleNamespace(pid=7, usedGpuMemory=1000)
        return [known, SimpleNamespace(pid=8, usedGpuMemory=None)]

    def _only_first(self, handle: int) -> None:
        if handle:
            raise self.NVMLError("Not Supported")


def test_units_and_what_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakePynvml())
    found, why = nvml.find()
    assert found is not None
    assert (found.names, why) == (["Tesla T4", "Old Card"], "")
    assert found.read() == [
        nvml.GpuReading(
            energy_mj=123_456,
            power_w=70.5,
            used_bytes=2**30,
            utilization=0.25,
            process_bytes={7: 1000},
        ),
        nvml.GpuReading(power_w=70.5),
    ]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (FakePynvml(has_driver=False), "Driver Not Loaded"),
        (FakePynvml(num_gpus=0), "no GPU"),
        (None, "not installed"),
    ],
)
def test_no_gpu_has_its_reason(monkeypatch: pytest.MonkeyPatch, module: Any, why: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)  # None: as if it were not installed
    meters = Meters()
    assert meters.gpus is None
    assert why in meters.why_no_gpus


@pytest.mark.gpu
def test_a_real_gpu_takes_energy() -> None:
    found, why = nvml.find()
    assert found is not None, why
    before = found.read()[0]
    time.sleep(0.5)
    after = found.read()[0]
    assert after.used_bytes is not None
    if before.energy_mj is not None and after.energy_mj is not None:
        watts = (after.energy_mj - before.energy_mj) / 1000 / 0.5
        assert 1 < watts < 2000
    else:
        assert after.power_w is not None

"""NVIDIA's management library behind a small protocol, so that tests and other meters can stand in.

Knows nothing of phases. A value that a device does not tell is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec


class GpuReading(msgspec.Struct, kw_only=True):
    """What one GPU says at one moment."""

    energy_mj: int | None = None  # since the driver was loaded; Volta and later
    power_w: float | None = None
    used_bytes: int | None = None  # by everybody
    utilization: float | None = None  # 0 to 1: share of time in which a kernel ran
    process_bytes: dict[int, int] = {}  # by pid; empty: it does not say (as in containers)


class Gpus(Protocol):
    """The GPUs of this machine."""

    names: list[str]

    def read(self) -> list[GpuReading]:
        """One reading per GPU, in the order of `names`."""
        ...


class Nvml:
    """`Gpus` by NVML."""

    def __init__(self) -> None:
        """Connect to the driver.

        Raises:
            ModuleNotFoundError: nvidia-ml-py is not installed.
            OSError: there is no driver, or no device.
        """
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self.names = [_string(pynvml.nvmlDeviceGetName(one)) for one in self._handles]
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None
        if not self._handles:
            raise OSError("NVML: no GPU")

    def read(self) -> list[GpuReading]:
        return [self._one(handle) for handle in self._handles]

    def _one(self, handle: Any) -> GpuReading:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return GpuReading(
            energy_mj=self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle),
            power_w=None if power_mw is None else power_mw / 1000,
            used_bytes=None if memory is None else int(memory.used),
            utilization=None if rates is None else rates.gpu / 100,
            process_bytes={
                one.pid: one.usedGpuMemory for one in processes if one.usedGpuMemory is not None
            },
        )

    def _ask(self, function: Callable[[Any], Any], handle: Any) -> Any:
        try:
            return function(handle)
        except self._nvml.NVMLError:
            return None


def find() -> tuple[Gpus | None, str]:
    """The GPUs that NVML sees, or None and why."""
    try:
        return Nvml(), ""
    except ModuleNotFoundError:
        return None, "nvidia-ml-py is not installed (extra `nvml`)"
    except OSError as error:
        return None, str(error)


def _string(told: str | bytes) -> str:
    return told.decode() if isinstance(told, bytes) else told

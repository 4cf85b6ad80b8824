"""The GPU of this machine and the software on it, as far as a result must name them.

Owns the facts and the status that says that there is no GPU. `python -m benchmarks.gpu.machine`
prints the facts as JSON: a driver that asks a process of its own keeps no context on the device.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

NO_GPU = 69  # exit status: EX_UNAVAILABLE of BSD's <sysexits.h>
SENTENCE = "There is no GPU here that torch can use: {problem}."
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.limit")
_PATIENCE_S = 120.0


def problem() -> str | None:
    """Why no GPU can be used; None if one can."""
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not installed"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} finds none"


def facts() -> dict[str, Any]:
    """Device, driver and versions; needs a GPU."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = "not installed"
    properties = torch.cuda.get_device_properties(0)
    told = _smi()
    return {
        "device": properties.name,
        "num_devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "num_multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": told.pop("driver_version", "unknown"),
        "state": told,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def ask(python: str, environment: dict[str, str]) -> dict[str, Any] | str:
    """The facts as a process of `python` finds them, or the sentence that says why there are none.

    Raises:
        RuntimeError: that process failed in another way.
    """
    command = [python, "-m", "benchmarks.gpu.machine"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=_PATIENCE_S
    )
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    if done.returncode == NO_GPU:
        return last
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {last}")
    found: dict[str, Any] = json.loads(last)
    return found


def _smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where it is missing or refuses."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode or len(lines) != 2:
        return {}
    return dict(zip(_SMI_FIELDS, (value.strip() for value in lines[1].split(",")), strict=False))


def main() -> int:
    if found := problem():
        print(SENTENCE.format(problem=found))
        return NO_GPU
    print(json.dumps(facts()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The GPUs that torch can use here, and their memory.

Owns every question to CUDA that comes before a model. Nothing but `memory_bytes` makes a CUDA
context. Without a GPU every device is the CPU: that is how tests, and ranks over gloo, run.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from penstock.kernels.jit import triton

LOWEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 products, asynchronous copies
FP8_CAPABILITY = (8, 9)  # Ada and Hopper: conversions and products of float8_e4m3fn


class Gpu(NamedTuple):
    """What is known of a GPU without using it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


def gpus() -> list[Gpu]:
    """Those that torch can use, in the order of their numbers."""
    found = []
    for index in range(_count()):
        told = torch.cuda.get_device_properties(index)
        found.append(Gpu(told.name, told.total_memory, (told.major, told.minor)))
    return found


def problem() -> str | None:
    """Why Triton kernels cannot run on a GPU here; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as told:  # torch says there why a driver fails
        warnings.simplefilter("always")
        found = gpus()
    if not found:
        why = f": {str(told[0].message).splitlines()[0].rstrip('.')}" if told else ""
        return f"torch finds no GPU that it can use{why}"
    for gpu in found:
        if gpu.capability < LOWEST_CAPABILITY:
            return f"`{gpu.name}` has compute capability {_dotted(gpu.capability)}; {_LOWEST}"
    return "Triton is not installed" if triton is None else None


def fp8_problem() -> str | None:
    """Why float8 cannot be used on the GPUs here; None if it can, or if there are none."""
    for gpu in gpus():
        if gpu.capability < FP8_CAPABILITY:
            lowest = _dotted(FP8_CAPABILITY)
            return (
                f"`{gpu.name}` has compute capability {_dotted(gpu.capability)}; fp8 needs {lowest}"
            )
    return None


def device(rank: int = 0) -> torch.device:
    """Where that rank of this machine computes."""
    return torch.device("cuda", rank) if _count() else torch.device("cpu")


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total memory of a GPU. This process then has a context there, taken off already."""
    free, total = torch.cuda.mem_get_info(device)
    return free, total


def _count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


_LOWEST = f"{_dotted(LOWEST_CAPABILITY)} is needed"

"""What tilings depend on: the sizes of a GPU. Knows no kernel."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Chip(NamedTuple):
    """What tilings depend on."""

    capability: int  # compute capability, 90 for 9.0
    shared_memory: int  # bytes that one program may have
    multiprocessors: int


HOPPER = Chip(90, 227 << 10, 132)
AMPERE = Chip(80, 163 << 10, 108)
SMALL = Chip(86, 99 << 10, 84)  # also what the kernels are cut for where there is no GPU


@cache
def chip(device: torch.device) -> Chip:
    """That of a device."""
    if device.type != "cuda":
        return SMALL
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some
    capability = found.major * 10 + found.minor
    shared_memory = int(found.shared_memory_per_block_optin)
    return Chip(capability, shared_memory, int(found.multi_processor_count))

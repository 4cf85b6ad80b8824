"""Products whose inner dimension several programs share, in one launch.

A product with few rows has too few tiles for all multiprocessors; then several programs take a part
of the inner dimension of a tile each and leave float32 sums, which the one that is done last adds
up: each counts itself when its own sums are in memory. Added up in the order of the parts, and not
by atomic additions, a product is the same to the last bit whenever it is repeated.

Owns how a dimension is cut, and what such programs do with their sums; `int_matmul` and
`fp8_matmul` compute these.
"""

from __future__ import annotations

from functools import cache

import torch

from penstock.kernels.chip import Chip, chip
from penstock.kernels.jit import jit, tl

_MAX_TILES = 1024  # that are shared: no more than there are programs at the same time
_OTHER_BYTES = 1024  # of shared memory, for scales and barriers


def cut(
    num_programs: int, num_steps: int, unit: int, waves: int, device: torch.device
) -> tuple[int, int]:
    """Into how many parts to cut an inner dimension, and how many steps a part has.

    Args:
        num_programs: that there are without cutting.
        num_steps: of the inner dimension.
        unit: steps that are taken at once; a part has 8 units at least.
        waves: how many programs a multiprocessor is to have.
    """
    units = num_steps // unit
    wanted = max(1, min(waves * chip(device).multiprocessors // num_programs, units // 8))
    steps = -(-units // wanted) * unit
    num_parts = -(-num_steps // steps)
    assert num_parts == 1 or num_programs <= _MAX_TILES
    return num_parts, steps


def room(num_parts: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs leave their sums, [num_parts, *out.shape] float32, and where they count."""
    shape = (num_parts if num_parts > 1 else 0, *out.shape)
    return torch.empty(shape, dtype=torch.float32, device=out.device), counters(out.device)


@cache
def counters(device: torch.device) -> torch.Tensor:
    """One for each tile: zeros, and again when a product is done. Products follow one another."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def stages(wanted: int, matrix_bytes: int, token_bytes: int, chip: Chip) -> int:
    """How many steps may be under way at once, of so many bytes each, or less than `wanted`."""
    # Warp groups read tokens where they lie, so that those of the step that is computed stay there.
    free = chip.shared_memory - _OTHER_BYTES - (token_bytes if chip.capability == 90 else 0)
    return min(wanted, free // (matrix_bytes + token_bytes) + 1)


@jit
def is_last(total, partial, counter, place, mask, size, part, num_parts):
    """Leave the sums of a part of a tile, and say whether those of all the others are there.

    `place` and `mask` are those of the tile in a matrix of `size` numbers.
    """
    tl.store(partial + part * size + place, total, mask=mask)
    # What all threads have stored is visible to whoever sees the count (release, acquire).
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1


@jit
def added(partial, counter, place, mask, size, num_parts, TOGETHER: tl.constexpr):
    """The sums of all parts of a tile, in their order, `TOGETHER` of them loaded at once."""
    tl.store(counter, 0)
    total = tl.zeros(place.shape, tl.float32)
    for first in range(0, num_parts, TOGETHER):
        for index in tl.static_range(TOGETHER):
            there = mask & (first + index < num_parts)
            place_of_part = partial + (first + index) * size + place
            total += tl.load(place_of_part, mask=there, other=0.0, cache_modifier=".cg")
    return total

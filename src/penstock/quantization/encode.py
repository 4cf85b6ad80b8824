"""Quantizes rows of a matrix, in plain torch, on whatever device they are.

Owns the arithmetic of the formats. Knows no layout. All of it is float32.
Invariant: int8 and int4 are the numbers of the native library, to the last bit: the same operations
in the same order as `csrc/src/pack.cpp` (`tests/quantization/test_device.py`).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from penstock.errors import EngineError
from penstock.kernels.quantize_fp8 import quantize_fp8

BLOCK = 128  # rows and columns of a block of fp8
_SIDE_BY_SIDE = 16  # sums of squared errors that the native library runs
_LARGEST_FP8 = 448.0


def int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n, K] as integers -127 to 127 (int8) and a scale a row [n].

    Raises:
        EngineError: a row is not finite.
    """
    values = values.float()
    scales = _divided(_peaks(values), 127.0)
    inverse = _reciprocal(scales)
    scales = torch.where(inverse > 0, scales, 0.0)
    q = (values * inverse[:, None]).round().clamp_(-127, 127)
    return q.to(torch.int8), scales


def int4(values: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values [n, K] as integers -8 to 7 (int8), factors of groups and scales of rows.

    A number is q * factor * scale. Factors are 1 to 15, the ones with the smallest squared error
    (0 for a group of zeros). What fills up the last group is 0.

    Returns:
        q [n, G * group_size], factors uint8 [n, G], scales [n].

    Raises:
        EngineError: a row is not finite.
    """
    values = values.float()
    peaks = _peaks(values)
    units = _divided(peaks, 15.0 * 7.5)  # the widest group has 15, and uses -7 to 7 (or -8)
    units = torch.where(_reciprocal(units) > 0, units, 0.0)
    num_groups = -(-values.shape[1] // group_size)
    values = functional.pad(values, (0, num_groups * group_size - values.shape[1]))
    groups = values.view(len(values), num_groups, group_size)
    factors = _best_factors(groups, units)
    inverse = _reciprocal(units[:, None] * factors)
    q = _nibbles(groups * inverse[:, :, None])
    return q.view(values.shape).to(torch.int8), factors.to(torch.uint8), units


def fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n, K] as float8_e4m3fn and a scale a row [n].

    Raises:
        EngineError: a row is not finite.
    """
    _peaks(values)
    return quantize_fp8.reference(values, 0)


def fp8_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n, K], whole blocks of rows or the last ones, as float8_e4m3fn [n, K].

    Returns:
        the numbers, and a scale a block, [ceil(n / 128), ceil(K / 128)].

    Raises:
        EngineError: a row is not finite.
    """
    num_rows, num_columns = values.shape
    _peaks(values)
    padded = functional.pad(values.float(), (0, -num_columns % BLOCK, 0, -num_rows % BLOCK))
    blocks = padded.view(len(padded) // BLOCK, BLOCK, -1, BLOCK)
    scales = _divided(blocks.abs().amax((1, 3)), _LARGEST_FP8)
    q = blocks * _reciprocal(scales)[:, None, :, None]
    q = q.view(padded.shape)[:num_rows, :num_columns].to(torch.float8_e4m3fn)
    return q.contiguous(), torch.where(_reciprocal(scales) > 0, scales, 0.0)


def _peaks(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, [n]."""
    peaks = values.abs().amax(1).float()
    if not bool(peaks.isfinite().all()):
        row = int((~peaks.isfinite()).nonzero()[0])
        raise EngineError(f"row `{row}` of the source is not finite.")
    return peaks


def _divided(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, rounded once: on a GPU torch multiplies by the reciprocal of a Python number."""
    return x / torch.full_like(x, number)


def _reciprocal(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where it is 0 or so small that the reciprocal is not finite."""
    inverse = 1.0 / scales
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _nibbles(quotients: torch.Tensor) -> torch.Tensor:
    return quotients.round().clamp_(-8, 7)


def _best_factors(groups: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Of groups [n, G, size]: the factor of `units` [n] with the smallest squared error, [n, G]."""
    peaks = groups.abs().amax(2)
    units = units[:, None]
    # From where the peak would be cut to -8 * 0.75 to where it would use -7 only.
    low = (peaks / (units * 9.5)).floor().clamp(1, 15)
    high = (peaks / (units * 6.5)).ceil().clamp(1, 15)
    best, best_error = high.clone(), torch.full_like(high, torch.inf)
    for factor in range(1, 16):
        error = _errors(groups, units * float(factor))
        better = (low <= factor) & (factor <= high) & (error < best_error)
        best = torch.where(better, float(factor), best)
        best_error = torch.where(better, error, best_error)
    return torch.where((peaks > 0) & (units > 0), best, 0.0)


def _errors(groups: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Squared errors of groups [n, G, size] in steps [n, 1], in the library's order: [n, G]."""
    inverse = 1.0 / steps
    difference = groups - _nibbles(groups * inverse[:, :, None]) * steps[:, :, None]
    squares = difference * difference
    lanes = squares.view(*squares.shape[:2], -1, _SIDE_BY_SIDE)
    total = lanes[:, :, 0]
    for place in range(1, lanes.shape[2]):
        total = total + lanes[:, :, place]
    for half in (8, 4):
        total = total[..., :half] + total[..., half:]
    return (total[..., 0] + total[..., 1]) + (total[..., 2] + total[..., 3])

"""Sums of a matrix product whose inner dimension several programs share.

    out[t, n] = (sum over s of partial[s, t, n]) * column_scale[n] * row_scale[t] + bias[n]

in float32, in the order of s, then rounded to the type of `out`. A product with few rows has too
few tiles for all multiprocessors; then several programs take a part of the inner dimension each and
leave float32 sums. Sums in a fixed order, and not atomic additions, make a product the
same to the last bit whenever it is repeated.

Tiling: a program has 1024 numbers of one row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.kernels.chip import Chip, chip
from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample

_BLOCK = 1024
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
    return -(-num_steps // steps), steps


def room(num_parts: int, out: torch.Tensor) -> torch.Tensor:
    """Where programs leave their sums: `out` itself, or one for each part."""
    if num_parts == 1:
        return out
    return torch.empty(num_parts, *out.shape, dtype=torch.float32, device=out.device)


def stages(wanted: int, matrix_bytes: int, token_bytes: int, chip: Chip) -> int:
    """How many steps may be under way at once, of so many bytes each, or less than `wanted`."""
    # Warp groups read tokens where they lie, so that those of the step that is computed stay there.
    free = chip.shared_memory - _OTHER_BYTES - (token_bytes if chip.capability == 90 else 0)
    return min(wanted, free // (matrix_bytes + token_bytes) + 1)


@jit(do_not_specialize=["num_parts", "num_rows"])
def _kernel(
    partial,
    column_scale,
    row_scale,
    bias,
    out,
    num_parts,
    num_rows,
    num_columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        start = (part * num_rows + row) * num_columns
        total += tl.load(partial + start + column, mask=mask, other=0.0)
    if column_scale is not None:
        total *= tl.load(column_scale + column, mask=mask, other=0.0)
    if row_scale is not None:
        total *= tl.load(row_scale + row)
    if bias is not None:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * num_columns + column, total.to(out.dtype.element_ty), mask=mask)


def _sum_splits(
    partial: torch.Tensor,
    column_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the sums of partial [S, T, N] float32, scaled, to out [T, N].

    Args:
        column_scale: [N] float32.
        row_scale: [T] float32.
        bias: [N], of any floating type.
    """
    num_parts, num_rows, num_columns = partial.shape
    grid = (num_rows, triton.cdiv(num_columns, _BLOCK))
    _kernel[grid](
        partial,
        column_scale,
        row_scale,
        bias,
        out,
        num_parts,
        num_rows,
        num_columns,
        BLOCK=_BLOCK,
    )


def reference(
    partial: torch.Tensor,
    column_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The same in plain torch."""
    total = partial.sum(0)
    if column_scale is not None:
        total *= column_scale
    if row_scale is not None:
        total *= row_scale[:, None]
    if bias is not None:
        total += bias.float()
    out.copy_(total)


def samples(device: torch.device) -> Iterator[Sample]:
    """Small arguments."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        out = torch.zeros(3, 1100, dtype=dtype, device=device)
        bias = drawn(1100).to(dtype)
        yield f"all, {dtype}", (drawn(4, 3, 1100), drawn(1100), drawn(3), bias, out), {}, tolerance
    out = torch.zeros(1, 5, device=device)
    yield "sum alone", (drawn(2, 1, 5), None, None, None, out), {}, 1e-6


def compilations() -> Iterator[Compilation]:
    """What the kernel is compiled for."""
    pointers = dict.fromkeys(("partial", "column_scale"), "*fp32:16")
    signature = pointers | {"bias": "*bf16:16", "out": "*bf16:16"}
    signature |= {"num_parts": "i32", "num_rows": "i32", "num_columns": "i32:16"}
    constexprs = {"row_scale": None, "BLOCK": _BLOCK}
    yield Compilation("sum_splits bf16", _kernel, signature, constexprs)


sum_splits = Op(_sum_splits, reference, samples)

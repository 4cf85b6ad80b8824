"""Activations as 8-bit floating point numbers (float8_e4m3fn), with scales found on the way.

    scale = max |x| / 448 over a token, or over 128 columns of it;  x8 = round(x / scale)

448 is the largest number of the format. What is all zeros has the scale 0 and is stored as zeros.

Layout: x [T, K]; x8 [T, K]; scales float32 [T], or [T, ceil(K / 128)] with those of neighbouring
tokens side by side in memory, as the product reads them.

Tiling: a program has a token, or 1024 columns of one; its numbers are read once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample

GROUP = 128
LARGEST = 448.0
_GROUPS_TOGETHER = 8
_SMALLEST_SCALE = 1e-37  # below it, its reciprocal would not be finite


@jit(do_not_specialize=["num_tokens"])
def _kernel(
    x,
    quantized,
    scales,
    num_tokens,
    num_columns,
    x_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = column < num_columns
    numbers = tl.load(x + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(numbers), axis=1) * (1.0 / LARGEST)
    scale = tl.where(scale < SMALLEST_SCALE, 0.0, scale)
    inverse = tl.where(scale > 0.0, 1.0 / scale, scale)
    numbers = (numbers * inverse[:, None]).to(tl.float8e4nv)
    tl.store(quantized + token * num_columns + column, numbers, mask=mask)
    tl.store(scales + group * num_tokens + token, scale, mask=group * GROUP < num_columns)


def _quantize_fp8(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as float8_e4m3fn [T, K], and its scales.

    Args:
        x: of any floating type; rows at any distance, columns side by side.
        group_size: 0: a scale a token, [T]. 128: one for 128 columns, [T, ceil(K / 128)].
    """
    assert group_size in {0, GROUP}
    assert x.stride(1) == 1
    num_tokens, num_columns = x.shape
    num_groups = triton.cdiv(num_columns, GROUP) if group_size else 1
    quantized = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_groups, num_tokens, dtype=torch.float32, device=x.device)
    if group_size:
        group, together = GROUP, _GROUPS_TOGETHER
    else:
        group, together = triton.next_power_of_2(num_columns), 1
    if num_tokens:
        grid = (num_tokens, triton.cdiv(num_columns, group * together))
        _kernel[grid](
            x,
            quantized,
            scales,
            num_tokens,
            num_columns,
            x.stride(0),
            **_constants(group, together),
            num_warps=max(4, min(16, group * together // 1024)),
        )
    return quantized, scales.T if group_size else scales[0]


def _constants(group: int, together: int) -> dict[str, float]:
    return {
        "GROUPS": together,
        "GROUP": group,
        "LARGEST": LARGEST,
        "SMALLEST_SCALE": _SMALLEST_SCALE,
    }


def reference(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    num_tokens, num_columns = x.shape
    group = group_size or max(num_columns, 1)
    num_groups = -(-num_columns // group)
    numbers = x.new_zeros(num_tokens, num_groups * group, dtype=torch.float32)
    numbers[:, :num_columns] = x
    numbers = numbers.view(num_tokens, num_groups, group)
    scales = numbers.abs().amax(2) * (1.0 / LARGEST)
    scales = torch.where(scales < _SMALLEST_SCALE, 0.0, scales)
    inverse = torch.where(scales > 0, 1.0 / scales, scales)
    quantized = (numbers * inverse[:, :, None]).view(num_tokens, -1)[:, :num_columns]
    quantized = quantized.contiguous().to(torch.float8_e4m3fn)
    return quantized, scales.T.contiguous().T if group_size else scales[:, 0]


def samples(device: torch.device) -> Iterator[Sample]:
    """Small arguments: ragged sizes, rows of zeros, large and tiny numbers."""
    generator = torch.Generator(device).manual_seed(0)
    for dtype, group_size, num_columns in (
        (torch.bfloat16, 0, 300),
        (torch.float32, 0, 16),
        (torch.bfloat16, 128, 1100),
        (torch.float16, 128, 100),
    ):
        x = torch.randn(5, num_columns + 8, generator=generator, device=device)
        x *= torch.tensor([[1.0], [1e3], [0.0], [1e-4], [1e-2]], device=device)
        x = x.to(dtype)[:, :num_columns]
        yield f"{dtype}, {num_columns} in {group_size or 'one'}", (x, group_size), {}, 1e-6


def compilations() -> Iterator[Compilation]:
    """What the kernel is compiled for."""
    signature = {"x": "*bf16:16", "quantized": "*fp8e4nv:16", "scales": "*fp32:16"}
    signature |= {"num_tokens": "i32", "num_columns": "i32:16", "x_stride": "i32:16"}
    for group, together, warps in ((16384, 1, 16), (GROUP, _GROUPS_TOGETHER, 4)):
        label = f"quantize_fp8 groups of {group}"
        constexprs = _constants(group, together)
        yield Compilation(label, _kernel, signature, constexprs, warps, lowest=89)


quantize_fp8 = Op(_quantize_fp8, reference, samples)

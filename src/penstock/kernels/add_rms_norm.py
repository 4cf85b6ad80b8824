"""Residual sum and root mean square norm (Zhang and Sennrich 2019) in one pass over memory.

    residual += x                                             rounded to the format of residual
    out = residual / sqrt(mean(residual^2) + eps) * weight    in fp32, of the rounded sum

x, residual and out are [T, H], weight is [H]. One program has one token, whose whole row it keeps
in registers: each number is read once and written once. Up to H = 16384 without spilling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample


@jit
def _add_rms_norm_kernel(
    x_ptr,  # [T, H], or None
    residual_ptr,  # [T, H]
    weight_ptr,  # [H]
    out_ptr,  # [T, H], contiguous
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < SIZE
    weight = tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32)
    place = residual_ptr + token * residual_stride + column
    total = tl.load(place, mask=valid, other=0.0)
    if x_ptr is not None:
        x = tl.load(x_ptr + token * x_stride + column, mask=valid, other=0.0)
        total = (total.to(tl.float32) + x.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(place, total, mask=valid)
    wide = total.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    out = (wide * factor * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * SIZE + column, out, mask=valid)


def _tiling(size: int) -> tuple[int, int]:
    """Width of the tile and number of warps: 16 numbers a thread, as two accesses of 16 bytes."""
    block = max(triton.next_power_of_2(size), 32)
    return block, min(max(block // (16 * 32), 1), 16)


def _add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add x [T, H], if any, to `residual` [T, H] in place, and return the norm of the sum.

    Args:
        residual: its rows may be apart; the result has its format.
        weight: [H], in any floating format.
    """
    num_tokens, size = residual.shape
    assert residual.stride(1) == 1, "a row lies in one piece"
    assert x is None or x.stride(1) == 1, "a row lies in one piece"
    out = torch.empty((num_tokens, size), dtype=residual.dtype, device=residual.device)
    block, num_warps = _tiling(size)
    _add_rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        0 if x is None else x.stride(0),
        residual.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        num_warps=num_warps,
    )
    return out


def reference(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The same in torch."""
    if x is not None:
        residual.add_(x)
    wide = residual.float()
    factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return wide.mul(factor).mul_(weight.float()).to(residual.dtype)


def samples(device: torch.device) -> Iterator[Sample]:
    """Rows that are no power of 2 and apart in memory, none and one of them; with and without x."""
    generator = torch.Generator().manual_seed(1)

    def normal(num_tokens: int, size: int, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
        """Rows of `size` numbers, with a gap between them."""
        wide = torch.randn((num_tokens, size + gap), generator=generator)
        return wide.to(device, dtype)[:, :size]

    for size in (1, 7, 96, 2050):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
            weight = 1 + normal(1, size, dtype)[0] / 4
            x, residual = normal(3, size, dtype, 5), normal(3, size, dtype, 3)
            yield f"{dtype} {size}", (x, residual, weight, 1e-5), {}, tolerance
    weight = torch.rand(64, generator=generator).to(device)
    residual = normal(5, 64, torch.float16)
    yield "alone, fp32 weight", (None, residual, weight, 1e-6), {}, 1e-3
    yield "no token", (None, residual[:0], weight, 1e-6), {}, 0.0
    # 257 is no bfloat16: with 256, 64 becomes 0.343, and with 257 0.3417, one bfloat16 less.
    pair = torch.tensor([[1.0, 0.0], [256.0, 64.0]]).to(device, torch.bfloat16)
    yield "rounded sum", (pair[:1], pair[1:], torch.ones(2, device=device), 1e-6), {}, 1e-3
    yield "eps rules", (None, residual[:1] * 1e-3, weight, 1.0), {}, 1e-3


add_rms_norm = Op(_add_rms_norm, reference, samples)


def compilations() -> Iterator[Compilation]:
    """What 8B models have, and the widest row."""
    integers = {"residual_stride": "i32:16", "eps": "fp32"}
    for name, size, with_x in (("bf16", 4096, True), ("bf16", 4096, False), ("fp32", 16384, True)):
        block, num_warps = _tiling(size)
        pointer = f"*{name}:16"
        signature = {"residual_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer, **integers}
        constexprs: dict[str, int | None] = {"SIZE": size, "BLOCK": block}
        if with_x:
            signature |= {"x_ptr": pointer, "x_stride": "i32:16"}
        else:
            constexprs |= {"x_ptr": None, "x_stride": 0}
        label = f"add_rms_norm {name} {size}{'' if with_x else ' alone'}"
        yield Compilation(label, _add_rms_norm_kernel, signature, constexprs, num_warps)

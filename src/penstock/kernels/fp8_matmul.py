"""Products of matrices of 8-bit floating point numbers (float8_e4m3fn) that have scales.

    y[t, n] = sum over k of (x8[t, k] * x_scale[t, g]) * (w8[n, k] * w_scale[n, g]) + bias[n]

With scales of tokens and rows there is one g, and scales are applied to the sums. With blocks, g is
k // 128 and w_scale has one number for 128 rows as well; sums over 128 columns are scaled, then
added (DeepSeek-V3, 2024). Either way the sums of the tensor cores, which keep about 14 bits on
Hopper, go on in float32 after every 128 columns.

Layout: x8 [T, K], w8 [N, K], contiguous.

Tiling: a program computes y for BLOCK_N rows of the matrix and BLOCK_T tokens in steps of 128
columns. A few tokens are the right operand of the tensor cores, whose short side that is, and
several programs share K (`split_k`). Many are the left one: a thread then has few rows of sums, and
few scales to load for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.kernels.chip import HOPPER, Chip, chip
from penstock.kernels.jit import INTERPRETED, jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample
from penstock.kernels.split_k import added, cut, is_last, room, stages

FIRST_TOKENS = (1, 17, 33, 65)  # numbers of tokens from which on tiles are others
BLOCK = 128
EXACT = 2e-5  # relative, of sums in float32
HARDWARE = 2e-3  # of sums of 128 products with 14 bits


@jit(do_not_specialize=["num_tokens", "num_steps", "steps_per_split", "step_stride"])
def _kernel(
    x,
    x_scale,
    weights,
    w_scale,
    bias,
    out,
    partial,  # [splits, T, N] float32, if several programs share K
    counters,
    num_tokens,
    num_rows,
    num_columns,
    num_steps,
    steps_per_split,
    token_stride,  # of x_scale
    step_stride,
    BLOCKS: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    EVEN: tl.constexpr,  # num_columns is a multiple of 128
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    TOGETHER: tl.constexpr = 4 if BLOCK_T <= 32 else 1  # parts of a sum, as registers allow
    # Programs that run at the same time share rows of both matrices, which the cache then has once.
    num_token_tiles, num_row_tiles = tl.num_programs(0), tl.num_programs(1)
    row_tile, token_tile = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), num_row_tiles, num_token_tiles, 16
    )
    split = tl.program_id(2)
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, 128)
    is_token = token < num_tokens
    # What lies behind the last row is computed from the last one, and not stored.
    safe_row = tl.minimum(row, num_rows - 1)
    w_tile = weights + safe_row[:, None].to(tl.int64) * num_columns + column[None, :]
    x_tile = x + token[None, :].to(tl.int64) * num_columns + column[:, None]
    # The scale of a block is loaded once for each token, because vectors are fetched ahead.
    block = row_tile * BLOCK_N // 128
    w_scale_tile = w_scale + (block * num_steps + token * 0 if BLOCKS else safe_row)
    x_scale_tile = x_scale + token.to(tl.int64) * token_stride
    if TOKENS_LEFT:
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, num_steps)
    for step in tl.range(first, last, num_stages=STAGES):
        if EVEN:
            w = tl.load(w_tile + step * 128)
            x_part = tl.load(x_tile + step * 128, mask=is_token[None, :], other=0.0)
        else:
            inside = step * 128 + column < num_columns
            w = tl.load(w_tile + step * 128, mask=inside[None, :], other=0.0)
            inside = inside[:, None] & is_token[None, :]
            x_part = tl.load(x_tile + step * 128, mask=inside, other=0.0)
        if INTERPRETED:  # it has no products of 8 bits
            w = w.to(tl.float32)
            x_part = x_part.to(tl.float32)
        left, right = (tl.trans(x_part), tl.trans(w)) if TOKENS_LEFT else (w, x_part)
        if BLOCKS:
            scale = tl.load(x_scale_tile + step * step_stride, mask=is_token, other=0.0)
            scale *= tl.load(w_scale_tile + step)
            scale = scale[:, None] if TOKENS_LEFT else scale[None, :]
            total += tl.dot(left, right, max_num_imprecise_acc=128) * scale
        else:
            total = tl.dot(left, right, total, max_num_imprecise_acc=128)
    if not TOKENS_LEFT:
        total = tl.trans(total)
    place = token[:, None].to(tl.int64) * num_rows + row[None, :]
    mask = is_token[:, None] & (row[None, :] < num_rows)
    num_splits = tl.num_programs(2)
    if num_splits > 1:
        counter = counters + row_tile * num_token_tiles + token_tile
        size = num_tokens.to(tl.int64) * num_rows
        if not is_last(total, partial, counter, place, mask, size, split, num_splits):
            return
        total = added(partial, counter, place, mask, size, num_splits, TOGETHER)
    if not BLOCKS:
        of_tokens = tl.load(x_scale_tile, mask=is_token, other=0.0)
        total *= tl.load(w_scale_tile)[None, :] * of_tokens[:, None]
    if bias is not None:
        total += tl.load(bias + safe_row).to(tl.float32)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def _fp8_matmul(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    w8: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply x8 [T, K] with w8 [N, K], both float8_e4m3fn: [T, N] in `out_dtype`.

    Args:
        x_scale: float32 [T]; with blocks [T, ceil(K / 128)], in any order in memory.
        w_scale: float32 [N]; with blocks [ceil(N / 128), ceil(K / 128)].
        bias: [N], of any floating type.
    """
    num_tokens, num_columns = x8.shape
    num_rows = len(w8)
    blocks = w_scale.dim() == 2
    num_steps = -(-num_columns // BLOCK)
    _check(x8, x_scale, w8, w_scale)
    out = torch.empty(num_tokens, num_rows, dtype=out_dtype, device=x8.device)
    if num_tokens == 0:
        return out
    form = _shape(num_tokens, chip(x8.device))
    tiles = triton.cdiv(num_tokens, form["BLOCK_T"]), triton.cdiv(num_rows, form["BLOCK_N"])
    waves = 2 if form["BLOCK_T"] <= 64 else 1
    splits, per_split = cut(tiles[0] * tiles[1], num_steps, 1, waves, x8.device)
    _kernel[(*tiles, splits)](
        x8,
        x_scale,
        w8,
        w_scale,
        bias,
        out,
        *room(splits, out),
        num_tokens,
        num_rows,
        num_columns,
        num_steps,
        per_split,
        x_scale.stride(0),
        x_scale.stride(1) if blocks else 0,
        BLOCKS=blocks,
        EVEN=num_columns % BLOCK == 0,
        INTERPRETED=INTERPRETED,
        **form,
    )
    return out


def _check(
    x8: torch.Tensor, x_scale: torch.Tensor, w8: torch.Tensor, w_scale: torch.Tensor
) -> None:
    """What the kernel relies on."""
    num_tokens, num_columns = x8.shape
    num_rows = len(w8)
    assert w8.shape[1] == num_columns
    assert x8.is_contiguous()
    assert w8.is_contiguous()
    assert w_scale.is_contiguous()
    if w_scale.dim() == 2:
        num_steps = -(-num_columns // BLOCK)
        assert w_scale.shape == (-(-num_rows // BLOCK), num_steps)
        assert x_scale.shape == (num_tokens, num_steps)
    else:
        assert w_scale.shape == (num_rows,)
        assert x_scale.shape == (num_tokens,)
        assert x_scale.is_contiguous()


def _shape(num_tokens: int, chip: Chip) -> dict[str, int]:
    """Tile sizes, and as many steps of loads under way as there is memory for.

    They change with the number of tokens only at those of `FIRST_TOKENS`.
    """
    rows, tokens, wanted, warps = 64, 64, 5, 4
    if num_tokens > 64:
        rows, tokens, wanted, warps = 128, 128, 4, 8
    elif num_tokens <= 32:
        tokens = 16 if num_tokens <= 16 else 32
    return {
        "BLOCK_N": rows,
        "BLOCK_T": tokens,
        "TOKENS_LEFT": num_tokens > 64,
        "STAGES": stages(wanted, rows * BLOCK, tokens * BLOCK, chip),
        "num_warps": warps,
    }


def reference(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    w8: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch."""
    if w_scale.dim() == 2:
        num_rows, num_columns = w8.shape
        x_scale = x_scale.repeat_interleave(BLOCK, 1)[:, :num_columns]
        w_scale = w_scale.repeat_interleave(BLOCK, 0)[:num_rows]
        w_scale = w_scale.repeat_interleave(BLOCK, 1)[:, :num_columns]
    else:
        x_scale, w_scale = x_scale[:, None], w_scale[:, None]
    out = (x8.float() * x_scale) @ (w8.float() * w_scale).T
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)


def samples(device: torch.device) -> Iterator[Sample]:
    """Small arguments: sizes that fill no tile, both kinds of scales."""
    exact = EXACT if device.type == "cpu" else HARDWARE
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for label, (num_tokens, num_rows, num_columns), blocks in (
        ("rows", (3, 70, 200), False),
        ("rows, long and few", (1, 5, 2048), False),
        ("rows, many tokens", (70, 9, 128), False),
        ("blocks", (18, 140, 300), True),
        ("blocks, long and few", (2, 7, 2100), True),
    ):
        steps = -(-num_columns // BLOCK)
        x8 = drawn(num_tokens, num_columns).to(torch.float8_e4m3fn)
        w8 = drawn(num_rows, num_columns).to(torch.float8_e4m3fn)
        x_scale = drawn(steps, num_tokens).abs().T if blocks else drawn(num_tokens).abs()
        w_scale = drawn(-(-num_rows // BLOCK), steps) if blocks else drawn(num_rows)
        bias = drawn(num_rows).to(torch.bfloat16)
        for out_dtype, tolerance in ((torch.float32, exact), (torch.bfloat16, 1e-2)):
            given = {"out_dtype": out_dtype, "bias": None if num_rows == 9 else bias}
            yield f"{label}, {out_dtype}", (x8, x_scale, w8, w_scale), given, tolerance


def compilations() -> Iterator[Compilation]:
    """What the kernel is compiled for: both kinds of scales, few tokens and many."""
    pointers = dict.fromkeys(("x", "weights"), "*fp8e4nv:16")
    pointers |= dict.fromkeys(("x_scale", "w_scale", "partial"), "*fp32:16")
    pointers |= {"bias": "*bf16:16", "out": "*bf16:16", "counters": "*i32:16"}
    numbers = {"num_tokens": "i32", "num_rows": "i32:16", "num_columns": "i32:16"}
    numbers |= dict.fromkeys(("num_steps", "steps_per_split", "step_stride"), "i32")
    for blocks in (False, True):
        for num_tokens in (16, 32, 64, 2048):
            form = _shape(num_tokens, HOPPER)
            warps = form.pop("num_warps")
            constexprs = form | {"BLOCKS": blocks, "EVEN": True}
            constexprs |= {"INTERPRETED": False, "token_stride": 1}
            yield Compilation(
                f"fp8_matmul {'blocks' if blocks else 'rows'}, {num_tokens} tokens",
                _kernel,
                pointers | numbers,
                constexprs,
                warps,
                lowest=90,
                wgmma=True,
            )


fp8_matmul = Op(_fp8_matmul, reference, samples)

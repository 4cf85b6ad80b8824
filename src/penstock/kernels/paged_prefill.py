"""Paged attention of rows of several query tokens: prompts, chunks of prompts, drafts.

A row's last `length` tokens of its `context` are its queries. One program has a tile of BLOCK_Q
query tokens with the G query heads of one KV head, BLOCK_M >= BLOCK_Q * G rows of a matrix; it
walks over the context in tiles of BLOCK_N tokens (`penstock.kernels.paged`). Three walks:

    window's edge   tiles that some query of the tile sees in part (only with a window)
    middle          tiles that every query sees: nothing is compared or masked
    diagonal        the last tiles, up to the last query's own token

What lies wholly outside the window is not visited. The grid is (tiles, KV heads): programs that
run together read one KV head, so that the L2 cache serves most of its tiles. The caller lists
tiles with long contexts first, so that the device does not end with a few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from penstock.kernels import paged
from penstock.kernels.chip import AMPERE, HOPPER, Chip
from penstock.kernels.chip import chip as chip_of
from penstock.kernels.jit import jit, tl
from penstock.kernels.op import Compilation, Op, Sample
from penstock.kernels.paged import Case, Tensors, attend


class Tiling(NamedTuple):
    """How the work of one program is cut."""

    block_m: int  # query tokens times query heads
    block_n: int  # tokens of the context
    num_warps: int
    num_stages: int  # tiles of keys and values in flight, and one that is computed


@jit(do_not_specialize_on_alignment=paged.INDICES)
def _prefill_kernel(
    q_ptr,  # [T, H, D]
    keys_ptr,  # [blocks, NUM_KV_HEADS, BLOCK_SIZE, D]
    values_ptr,
    key_scale_ptr,  # [blocks, NUM_KV_HEADS, BLOCK_SIZE], or None
    value_scale_ptr,
    sinks_ptr,  # [H], or None
    table_ptr,  # [N, M]
    rows_ptr,  # [R]
    query_start_ptr,  # [R + 1]
    context_len_ptr,  # [R]
    tile_rows_ptr,  # [tiles] row of the batch
    tile_starts_ptr,  # [tiles] first query token, from the row's first
    out_ptr,  # [T, H, D], contiguous
    q_stride_token,
    q_stride_head,
    table_stride,
    inner_scale,
    outer_scale,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SCALED: tl.constexpr = key_scale_ptr is not None
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(tile_rows_ptr + tile)
    first_query = tl.load(tile_starts_ptr + tile)
    start = tl.load(query_start_ptr + row)
    length = tl.load(query_start_ptr + row + 1) - start
    context = tl.load(context_len_ptr + row)
    table = table_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride

    # Rows of the tile that have no token repeat the last one; they are not stored.
    index = tl.arange(0, BLOCK_M)
    end_query = tl.minimum(first_query + BLOCK_Q, length)
    token = first_query + index // GROUP
    stored = token < end_query
    token = tl.minimum(token, end_query - 1)
    query_head = head * GROUP + index % GROUP
    numbers = tl.arange(0, D_PADDED)
    place = (start + token).to(tl.int64)
    pointers = q_ptr + (place * q_stride_token + query_head * q_stride_head)[:, None]
    query = tl.load(pointers + numbers[None, :], mask=(numbers < D)[None, :], other=0.0)

    past = context - length
    position = past + token
    lowest = past + first_query
    highest = past + end_query - 1
    # Tokens [begin, edge) and [diagonal, end) are seen by some queries, [edge, diagonal) by all.
    begin = 0
    diagonal = (lowest + 1) // BLOCK_N * BLOCK_N
    end = tl.cdiv(highest + 1, BLOCK_N) * BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        edge = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(edge, diagonal)

    accumulator = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    if sinks_ptr is None:
        total = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    else:  # a sink is a token seen first, with a score and no value
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
        top = tl.load(sinks_ptr + query_head).to(tl.float32) * 1.4426950408889634
    # The same for every walk but for its first tokens, their end, and whether they are masked.
    if WINDOW > 0:
        accumulator, total, top = attend(
            accumulator, total, top, query, position, begin, edge, context,
            keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
            inner_scale, outer_scale, True, WINDOW, CAPPED, SCALED,
            NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
        )  # fmt: skip
        begin = edge
    accumulator, total, top = attend(
        accumulator, total, top, query, position, begin, diagonal, context,
        keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
        inner_scale, outer_scale, False, 0, CAPPED, SCALED,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
    )  # fmt: skip
    accumulator, total, top = attend(
        accumulator, total, top, query, position, diagonal, end, context,
        keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
        inner_scale, outer_scale, True, WINDOW, CAPPED, SCALED,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
    )  # fmt: skip

    out = out_ptr + ((place * NUM_KV_HEADS * GROUP + query_head) * D)[:, None] + numbers[None, :]
    result = accumulator / total[:, None]
    tl.store(out, result.to(out_ptr.dtype.element_ty), stored[:, None] & (numbers < D)[None, :])


def rows_of_tile(longest: int, group: int, head_dim: int, chip: Chip) -> int:
    """BLOCK_M for rows of at most `longest` query tokens.

    A warp group multiplies 64 rows at once; two of them share the tiles of keys and values. Where
    a KV head has more query heads than that, one token fills the tile.
    """
    is_large = longest * group > 64 and (head_dim <= 128 or chip.capability == 90)
    return max(128 if is_large else 64, paged.padded(group))


def tiles(lengths: list[int], block_q: int) -> list[tuple[int, int]]:
    """(row, first query token) of the tiles of all rows of several query tokens.

    The last tiles of long prompts come first: they have most to do.
    """
    found = [
        (start, row)
        for row, length in enumerate(lengths)
        if length > 1
        for start in range(0, length, block_q)
    ]
    return [(row, start) for start, row in sorted(found, reverse=True)]


@cache
def tiling_for(
    block_m: int, head_dim: int, dtype: torch.dtype, pages: torch.dtype, chip: Chip
) -> Tiling:
    """What suits a chip: as much as registers and shared memory hold.

    On Hopper at D = 64 one warp group has 128 rows, and two programs share a multiprocessor: one
    computes exponentials while the other multiplies. At D = 128 two warp groups share a program;
    128 tokens a tile halve what is spent on rescaling and waiting.
    """
    padded, is_hopper = paged.padded(head_dim), chip.capability == 90
    is_small = (block_m == 64 and padded <= 128) or (is_hopper and block_m * padded <= 8192)
    num_warps = 4 if is_small else 8
    block_n, num_stages = 64, 3
    if dtype.itemsize == 4 or (block_m == 64 and (padded > 128 or not is_hopper)):
        block_n = 32
    elif padded > 128:
        num_stages = 2
    elif is_hopper and padded == 128 and block_m == 128 and pages == dtype:
        block_n = 128
    while num_stages > 1 or block_n > 16:
        query = block_m * padded * dtype.itemsize
        # 8-bit tiles are converted, and multiplied from a place of their own.
        numbers = num_stages * pages.itemsize + (0 if pages == dtype else dtype.itemsize)
        if query + 2 * block_n * padded * numbers <= chip.shared_memory:
            break
        if num_stages > 2 or block_n == 16:
            num_stages -= 1
        else:
            block_n //= 2
    return Tiling(block_m, block_n, num_warps, num_stages)


def _paged_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_starts: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    block_m: int,
    tiling: Tiling | None = None,
) -> None:
    """Attention of the listed tiles into `out`; what they do not cover, it leaves.

    Args:
        q: as all up to `context_len`: see `penstock.kernels.paged.Tensors`.
        tile_rows: [tiles] int32, rows of the batch.
        tile_starts: [tiles] int32, multiples of `block_m // (H // Hkv)`, the tokens of a tile.
        out: [T, H, D], contiguous.
        window: a query sees itself and the window - 1 tokens before; 0: all before.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0: they stay.
        tiling: how to cut the work, if not as `tiling_for` says.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = keys.shape[1:3]
    group = num_heads // num_kv_heads
    cut = tiling or tiling_for(block_m, head_dim, q.dtype, keys.dtype, chip_of(q.device))
    assert cut.block_m == block_m >= group
    assert q.stride(2) == 1
    assert all(x.is_contiguous() for x in (keys, values, out))
    if len(tile_rows) == 0:
        return
    inner_scale, outer_scale = paged.factors(scale, soft_cap)
    _prefill_kernel[(len(tile_rows), num_kv_heads)](
        q,
        keys,
        values,
        key_scale,
        value_scale,
        sinks,
        block_table,
        rows,
        query_start,
        context_len,
        tile_rows,
        tile_starts,
        out,
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        inner_scale,
        outer_scale,
        WINDOW=window,
        CAPPED=soft_cap > 0,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        D=head_dim,
        D_PADDED=paged.padded(head_dim),
        BLOCK_M=block_m,
        BLOCK_Q=block_m // group,
        BLOCK_N=cut.block_n,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )


def reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_starts: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    block_m: int,
    tiling: Tiling | None = None,
) -> None:
    """The same in torch, row by row. Every row has all of its tiles in the list."""
    t = Tensors(
        q, keys, values, key_scale, value_scale, sinks, block_table, rows, query_start, context_len
    )
    paged.attend_rows(t, tile_rows.unique().tolist(), out, scale, window, soft_cap)


def samples(device: torch.device) -> Iterator[Sample]:
    """Ragged rows with and without earlier tokens, all formats and features, several tilings."""
    b16, f16 = torch.bfloat16, torch.float16
    small = Tiling(16, 16, 4, 2)
    ragged = (5, 1, 17, 2), (5, 9, 40, 30)
    cases = [
        (Case("plain", *ragged), small),
        (Case("pages of one token", *ragged, block_size=1, num_heads=7, num_kv_heads=1), small),
        (Case("one block holds a tile", *ragged, block_size=32, num_kv_heads=4), small),
        (Case("pages of 5", *ragged, block_size=5, num_heads=6, window=7), small),
        (Case("large pages", *ragged, block_size=256, dtype=f16, soft_cap=2.0), small),
        (Case("bf16", *ragged, dtype=b16, head_dim=20, has_sinks=True), small),
        (Case("int8", *ragged, pages=torch.int8, window=16, soft_cap=5.0), small),
        (Case("fp8", *ragged, dtype=b16, pages=torch.float8_e4m3fn, head_dim=24), small),
        (Case("window of one", (20, 18), (20, 30), window=1, has_sinks=True), small),
        (Case("window over a tile", (40,), (50,), window=18, num_heads=2), small),
        (Case("default tiling", (70, 3), (75, 80), num_heads=2), None),
        (Case("more heads than rows", (2,), (3,), num_heads=65, num_kv_heads=1, head_dim=8), None),
    ]
    for case, cut in cases:
        t = paged.case_tensors(case, device)
        group, longest = case.num_heads // case.num_kv_heads, max(case.lengths)
        block_m = rows_of_tile(longest, group, case.head_dim, chip_of(device))
        block_m = block_m if cut is None else cut.block_m
        found = tiles(list(case.lengths), block_m // group)
        listed = torch.tensor(found, dtype=torch.int32, device=device)
        out = torch.zeros(t.q.shape, dtype=case.dtype, device=device)
        args = (*t, listed[:, 0].contiguous(), listed[:, 1].contiguous(), out)
        kwargs = {**case.options(), "block_m": block_m, "tiling": cut}
        yield case.label, args, kwargs, case.tolerance


paged_prefill = Op(_paged_prefill, reference, samples)


def compilations() -> Iterator[Compilation]:
    """For 16-bit and 8-bit pages at the usual sizes, with each feature."""
    kinds = {
        torch.bfloat16: "*bf16:16",
        torch.int8: "*i8:16",
        torch.float8_e4m3fn: "*fp8e4nv:16",
    }
    for label, chip, pages, head_dim, group, block_size, longest, changes in (
        ("D=128", HOPPER, torch.bfloat16, 128, 4, 16, 512, {}),
        ("window, cap", HOPPER, torch.bfloat16, 128, 4, 64, 512, {"CAPPED": True, "WINDOW": 4096}),
        ("D=64, sinks", HOPPER, torch.bfloat16, 64, 8, 32, 512, {"sinks_ptr": "*fp32:16"}),
        ("short rows", HOPPER, torch.bfloat16, 80, 7, 1, 2, {}),
        ("D=256", HOPPER, torch.bfloat16, 256, 2, 16, 512, {}),
        ("int8", HOPPER, torch.int8, 128, 4, 16, 512, {}),
        ("fp8", HOPPER, torch.float8_e4m3fn, 128, 4, 16, 512, {}),
        ("D=128", AMPERE, torch.bfloat16, 128, 4, 16, 512, {}),
        ("D=64, sinks", AMPERE, torch.bfloat16, 64, 8, 32, 512, {"sinks_ptr": "*fp32:16"}),
        ("D=256, int8", AMPERE, torch.int8, 256, 2, 16, 512, {}),
    ):
        block_m = rows_of_tile(longest, group, head_dim, chip)
        cut = tiling_for(block_m, head_dim, torch.bfloat16, pages, chip)
        arguments = paged.arguments(
            _prefill_kernel, "*bf16:16", kinds[pages], group, block_size, head_dim
        )
        arguments |= {"BLOCK_M": block_m, "BLOCK_Q": block_m // group}
        arguments |= {"BLOCK_N": cut.block_n, **changes}
        yield paged.compilation(
            f"paged_prefill {chip.capability} {label}",
            _prefill_kernel,
            arguments,
            cut.num_warps,
            cut.num_stages,
        )._replace(wgmma=True, lowest=chip.capability)

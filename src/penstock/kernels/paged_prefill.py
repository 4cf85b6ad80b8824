"""Paged attention of rows of several query tokens: prompts, chunks of prompts, drafts.

A row's last `length` tokens of its `context` are its queries. One program has a tile of BLOCK_Q
query tokens with the G query heads of one KV head, BLOCK_M >= BLOCK_Q * G rows of a matrix; it
walks over the context in tiles of BLOCK_N tokens (`penstock.kernels.paged`). Three walks:

    window's edge   tiles that some query of the tile sees in part (only with a window)
    middle          tiles that every query sees: nothing is compared or masked
    diagonal        the last tiles, up to the last query's own token

What lies wholly outside the window is not visited. The grid is (pieces of work, KV heads): programs
that run together read one KV head, so that the L2 cache serves most of its tiles. Those with long
contexts come first, so that the device does not end with a few of them.

A few new tokens behind a long context make too few tiles to keep a chip busy, and one long tile
among many keeps it waiting. So the host (`schedule`) cuts the contexts of such tiles into shares,
each of them a piece of work; the program that is done last puts them together, as in decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.kernels import paged
from penstock.kernels.chip import AMPERE, HOPPER, Chip
from penstock.kernels.chip import chip as chip_of
from penstock.kernels.jit import jit, tl
from penstock.kernels.op import Compilation, Op, Sample
from penstock.kernels.paged import Case, Tensors, attend

MIN_SHARE = 512  # tokens of the context that a share has at least
MAX_SPLITS = 32  # of a tile: putting shares together takes time as well
COMBINED_NUMBERS = 32  # of partial outputs that a thread loads at once


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
    work_ptr,  # [n, 4]: see `schedule`
    out_ptr,  # [T, H, D], contiguous
    partial_ptr,  # [shares, NUM_KV_HEADS, BLOCK_M, D] float32
    partial_log_ptr,  # [shares, NUM_KV_HEADS, BLOCK_M] float32
    counters_ptr,  # [shares, NUM_KV_HEADS] int32: zeros, and again afterwards
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
    MIN_TILES: tl.constexpr,  # of a share
    ROWS: tl.constexpr,
    LOADED: tl.constexpr,
):
    SCALED: tl.constexpr = key_scale_ptr is not None
    piece = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(work_ptr + piece * 4)
    first_query = tl.load(work_ptr + piece * 4 + 1)
    split = tl.load(work_ptr + piece * 4 + 2)
    splits = tl.load(work_ptr + piece * 4 + 3)
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
    tiles = (end - begin) // BLOCK_N
    share = tl.maximum(tl.cdiv(tiles, splits), MIN_TILES)
    shares = tl.cdiv(tiles, share)
    if split >= shares:
        return
    begin += split * share * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, end)

    accumulator = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # a token that the first share has seen, with a score and no value
        sinks = tl.load(sinks_ptr + query_head).to(tl.float32) * 1.4426950408889634
        top = tl.where(split == 0, sinks, top)
        total += tl.where(split == 0, 1.0, 0.0)
    # The same for every walk but for its first tokens, their end, and whether they are masked.
    if WINDOW > 0:
        accumulator, total, top = attend(
            accumulator, total, top, query, position, begin, tl.minimum(edge, end), context,
            keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
            inner_scale, outer_scale, True, WINDOW, CAPPED, SCALED,
            NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
        )  # fmt: skip
        begin = tl.maximum(begin, edge)
    accumulator, total, top = attend(
        accumulator, total, top, query, position, begin, tl.minimum(diagonal, end), context,
        keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
        inner_scale, outer_scale, False, 0, CAPPED, SCALED,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
    )  # fmt: skip
    accumulator, total, top = attend(
        accumulator, total, top, query, position, tl.maximum(begin, diagonal), end, context,
        keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
        inner_scale, outer_scale, True, WINDOW, CAPPED, SCALED,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
    )  # fmt: skip

    # A share of a window may hold nothing that a query sees.
    result = accumulator / tl.where(total > 0.0, total, 1.0)[:, None]
    if shares == 1:
        place = (place * NUM_KV_HEADS * GROUP + query_head) * D
        inside = stored[:, None] & (numbers < D)[None, :]
        out = out_ptr + place[:, None] + numbers[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), inside)
    else:
        first = (piece - split) * NUM_KV_HEADS + head  # of the tile; other shares lie behind it
        vector = (first.to(tl.int64) + split * NUM_KV_HEADS) * BLOCK_M + index
        there = (numbers < D)[None, :]
        tl.store(partial_ptr + (vector * D)[:, None] + numbers[None, :], result, there)
        tl.store(partial_log_ptr + vector, top + tl.log2(total))
        # What all threads have stored is visible to whoever sees the count (release, acquire).
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + first, 1, sem="acq_rel")
        if arrived == shares - 1:
            tl.store(counters_ptr + first, 0)
            for rows_start in range(0, BLOCK_M, ROWS):
                _combine(
                    partial_ptr, partial_log_ptr, out_ptr, first.to(tl.int64) * BLOCK_M, shares,
                    start + first_query, end_query - first_query, head, rows_start,
                    GROUP, NUM_KV_HEADS, BLOCK_M, D, D_PADDED, ROWS, LOADED,
                )  # fmt: skip


@jit
def _combine(
    partial_ptr,
    partial_log_ptr,
    out_ptr,
    first_vector,  # of the tile's first share
    shares,
    first_token,  # of the tile
    num_tokens,
    head,
    rows_start,  # of the tile's BLOCK_M rows
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LOADED: tl.constexpr,
):
    """Write the output of `ROWS` rows of a tile."""
    index = rows_start + tl.arange(0, ROWS)
    numbers = tl.arange(0, D_PADDED)
    whole = paged.combined(
        partial_ptr, partial_log_ptr, first_vector + index, NUM_KV_HEADS * BLOCK_M, shares,
        D, D_PADDED, ROWS, LOADED,
    )  # fmt: skip
    token = (first_token + index // GROUP).to(tl.int64)
    place = ((token * NUM_KV_HEADS + head) * GROUP + index % GROUP) * D
    inside = (index // GROUP < num_tokens)[:, None] & (numbers < D)[None, :]
    pointers = out_ptr + place[:, None] + numbers[None, :]
    tl.store(pointers, whole.to(out_ptr.dtype.element_ty), inside)


def rows_of_tile(longest: int, group: int, head_dim: int, chip: Chip) -> int:
    """BLOCK_M for rows of at most `longest` query tokens.

    A warp group multiplies 64 rows at once; two of them share the tiles of keys and values. Where
    a KV head has more query heads than that, one token fills the tile.
    """
    is_large = longest * group > 64 and (head_dim <= 128 or chip.capability == 90)
    return max(128 if is_large else 64, paged.padded(group))


def schedule(
    lengths: Sequence[int],
    contexts: Sequence[int],
    block_q: int,
    most_programs: float,
    min_share: int = MIN_SHARE,
) -> tuple[NDArray[np.int32], int]:
    """The work for all rows of several query tokens, and how many pieces of it are shares.

    A piece is [row of the batch, the tile's first query token from the row's first, number of the
    share, shares of the tile]. Shares of a tile follow one another, tiles that are shared come
    first, and what has most to do comes first among them and among the others.

    Args:
        lengths: [R] query tokens.
        contexts: [R] context lengths, or upper bounds of them.
        block_q: query tokens of a tile.
        most_programs: that the chip runs at once, for each KV head; there are no more shares.
        min_share: tokens that a share has at least.
    """
    tiles = [
        (context - length + min(start + block_q, length), row, start)
        for row, (length, context) in enumerate(zip(lengths, contexts, strict=True))
        if length > 1
        for start in range(0, length, block_q)
    ]
    tiles.sort(reverse=True)
    share = max(min_share, sum(span for span, _, _ in tiles) / most_programs)
    work = []
    num_shares = 0
    for span, row, start in tiles:
        splits = max(1, min(MAX_SPLITS, int(span / share)))
        num_shares += splits if splits > 1 else 0
        work += [(row, start, split, splits) for split in range(splits)]
    return np.array(work, np.int32).reshape(-1, 4), num_shares


def programs_at_once(block_m: int, head_dim: int, num_kv_heads: int, chip: Chip) -> float:
    """Programs for each KV head that a chip runs at once."""
    resident = 2 if block_m * paged.padded(head_dim) <= 8192 else 1
    return resident * chip.multiprocessors / num_kv_heads


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
    t: Tensors,
    work: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    block_m: int,
    num_shares: int = 0,
    tiling: Tiling | None = None,
    min_share: int = MIN_SHARE,
) -> None:
    """Attention of the listed tiles into `out`; what they do not cover, it leaves.

    Args:
        t: see `penstock.kernels.paged.Tensors`.
        work: [n, 4] int32, contiguous, by `schedule` for tiles of `block_m // (H // Hkv)` tokens.
        counters: [num_shares * Hkv] int32 or more, zeros; they are zeros again when this is done.
        out: [T, H, D], contiguous.
        window: a query sees itself and the window - 1 tokens before; 0: all before.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0: they stay.
        num_shares: pieces of work that are shares of a tile; they come first.
        tiling: how to cut the work, if not as `tiling_for` says.
        min_share: tokens that a share has at least, if the device finds less to do than the host.
    """
    num_heads, head_dim = t.q.shape[1:]
    num_kv_heads, block_size = t.keys.shape[1:3]
    group = num_heads // num_kv_heads
    cut = tiling or tiling_for(block_m, head_dim, t.q.dtype, t.keys.dtype, chip_of(t.q.device))
    assert cut.block_m == block_m >= group
    assert t.q.stride(2) == 1
    assert all(x.is_contiguous() for x in (t.keys, t.values, work, out))
    assert len(counters) >= num_shares * num_kv_heads
    if len(work) == 0:
        return
    inner_scale, outer_scale = paged.factors(scale, soft_cap)
    shape = (num_shares, num_kv_heads, block_m)
    _prefill_kernel[(len(work), num_kv_heads)](
        *t,
        work,
        out,
        torch.empty((*shape, head_dim), dtype=torch.float32, device=t.q.device),
        torch.empty(shape, dtype=torch.float32, device=t.q.device),
        counters,
        t.q.stride(0),
        t.q.stride(1),
        t.block_table.stride(0),
        inner_scale,
        outer_scale,
        WINDOW=window,
        CAPPED=soft_cap > 0,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        **paged.sizes(group, num_kv_heads, block_size, head_dim),
        **_cut_sizes(cut, group, head_dim, min_share),
    )


def _cut_sizes(cut: Tiling, group: int, head_dim: int, min_share: int) -> dict[str, int]:
    """The constants of the kernel that its tiling gives."""
    vectors = COMBINED_NUMBERS * 32 * cut.num_warps // paged.padded(head_dim)
    rows = min(cut.block_m, max(1, vectors // 4))
    return {
        "BLOCK_M": cut.block_m,
        "BLOCK_Q": cut.block_m // group,
        "BLOCK_N": cut.block_n,
        "MIN_TILES": max(1, min_share // cut.block_n),
        "ROWS": rows,
        "LOADED": max(1, vectors // rows),
    }


def reference(
    t: Tensors,
    work: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    block_m: int,
    num_shares: int = 0,
    tiling: Tiling | None = None,
    min_share: int = MIN_SHARE,
) -> None:
    """The same in torch, row by row. Every row has all of its tiles in the list."""
    paged.attend_rows(t, work[:, 0].unique().tolist(), out, scale, window, soft_cap)


def samples(device: torch.device) -> Iterator[Sample]:
    """Ragged rows with and without earlier tokens, all formats and features, several tilings."""
    b16, f16 = torch.bfloat16, torch.float16
    small, large = Tiling(16, 16, 4, 2), Tiling(128, 16, 8, 2)
    ragged = (5, 1, 17, 2), (5, 9, 40, 30)
    shared = (3, 1, 18, 2), (203, 9, 20, 90)
    cases = [  # with tokens of a share
        (Case("plain", *ragged), small, 512),
        (Case("pages of one token", *ragged, block_size=1, num_heads=7, num_kv_heads=1), small, 16),
        (Case("one block holds a tile", *ragged, block_size=32, num_kv_heads=4), small, 512),
        (Case("pages of 5", *ragged, block_size=5, num_heads=6, window=7), small, 512),
        (Case("large pages", *ragged, block_size=256, dtype=f16, soft_cap=2.0), small, 512),
        (Case("bf16", *ragged, dtype=b16, head_dim=20, has_sinks=True), small, 512),
        (Case("int8", *ragged, pages=torch.int8, window=16, soft_cap=5.0), small, 512),
        (Case("bf16, int8", *ragged, dtype=b16, pages=torch.int8, block_size=32), small, 512),
        (Case("fp8", *ragged, dtype=b16, pages=torch.float8_e4m3fn, head_dim=24), small, 512),
        (Case("fp16, fp8", *shared, dtype=f16, pages=torch.float8_e4m3fn), small, 64),
        (Case("most see nothing", (128,), (128,), 1, 1, 256, dtype=b16, window=1), large, 16),
        (Case("window over a tile", (40,), (50,), window=18, num_heads=2), small, 512),
        (Case("shares", *shared, head_dim=12, block_size=7, has_sinks=True), small, 32),
        # The first share has one token of the window of the first query, and of the others none.
        (Case("shares of a window", (9, 4), (170, 40), window=67, soft_cap=3.0), small, 16),
        (Case("default tiling", (70, 3), (75, 80), num_heads=2), None, 512),
        (Case("default shares", (40, 1), (1100, 3), 4, 1, 128, dtype=b16), None, 512),
        (Case("many heads", (2,), (3,), num_heads=65, num_kv_heads=1, head_dim=8), None, 512),
    ]
    for case, cut, min_share in cases:
        t = paged.case_tensors(case, device)
        group, longest = case.num_heads // case.num_kv_heads, max(case.lengths)
        block_m = rows_of_tile(longest, group, case.head_dim, chip_of(device))
        block_m = block_m if cut is None else cut.block_m
        found, num_shares = schedule(case.lengths, case.contexts, block_m // group, 1e3, min_share)
        work = torch.from_numpy(found).to(device)
        counters = torch.zeros(num_shares * case.num_kv_heads, dtype=torch.int32, device=device)
        out = torch.zeros(t.q.shape, dtype=case.dtype, device=device)
        sizes = {"block_m": block_m, "num_shares": num_shares, "min_share": min_share}
        kwargs = {**case.options(), **sizes, "tiling": cut}
        yield case.label, (t, work, counters, out), kwargs, case.tolerance


paged_prefill = Op(_paged_prefill, reference, samples)


def compilations() -> Iterator[Compilation]:
    """For 16-bit and 8-bit pages at the usual sizes, with each feature."""
    bf16, fp16, int8, fp8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
    names = {bf16: "*bf16:16", fp16: "*fp16:16", int8: "*i8:16", fp8: "*fp8e4nv:16"}
    for label, chip, dtype, pages, head_dim, group, block_size, longest, changes in (
        ("D=128", HOPPER, bf16, bf16, 128, 4, 16, 512, {}),
        ("window, cap", HOPPER, bf16, bf16, 128, 4, 64, 512, {"CAPPED": True, "WINDOW": 4096}),
        ("D=64, sinks", HOPPER, bf16, bf16, 64, 8, 32, 512, {"sinks_ptr": "*fp32:16"}),
        ("short rows", HOPPER, bf16, bf16, 80, 7, 1, 2, {}),
        ("D=256", HOPPER, fp16, fp16, 256, 2, 16, 512, {}),
        ("int8", HOPPER, bf16, int8, 128, 4, 16, 512, {}),
        ("fp8", HOPPER, bf16, fp8, 128, 4, 16, 512, {}),
        ("D=128", AMPERE, bf16, bf16, 128, 4, 16, 512, {}),
        ("D=256, int8", AMPERE, fp16, int8, 256, 2, 16, 512, {}),
    ):
        block_m = rows_of_tile(longest, group, head_dim, chip)
        cut = tiling_for(block_m, head_dim, dtype, pages, chip)
        arguments = paged.arguments(
            _prefill_kernel, names[dtype], names[pages], group, block_size, head_dim
        )
        arguments |= {**_cut_sizes(cut, group, head_dim, MIN_SHARE), **changes}
        yield paged.compilation(
            f"paged_prefill {chip.capability} {label}",
            _prefill_kernel,
            arguments,
            cut.num_warps,
            cut.num_stages,
        )._replace(wgmma=True, lowest=chip.capability)

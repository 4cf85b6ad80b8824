"""Paged attention of rows of one query token, their contexts split over programs.

Flash-Decoding (Dao et al., 2023). One token leaves a row with as many programs as it has KV heads,
too few to keep the memory busy; so a context is cut into shares, a program for each. The program
that is done last puts the shares together (`paged.combined`): each counts itself when its own part
is in memory. That costs no second launch, which would take as long as reading a thousand tokens.

The grid is (rows, KV heads, splits) and fixed by the launch, so that a CUDA graph holds it; how
much a program does follows from the row's context, which is read on the device (`Splits`). Short
rows leave programs without work, and a row of one share is written to the output at once. The G
query heads of a KV head are the rows of the matrix, at least 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from penstock.kernels import paged
from penstock.kernels.chip import Chip
from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample
from penstock.kernels.paged import Case, Tensors, attend

MAX_SPLITS = 128
PROGRAMS = 2  # a multiprocessor, that a launch aims at
MAX_PROGRAMS = 16  # a multiprocessor: idle ones take time as well
MIN_SHARE = 128  # tokens that a program has at least, if the row has more
LONG_SHARE = 8192  # and at most, so that a single long row does not keep the rest waiting
COMBINED_NUMBERS = 4096  # of partial outputs that a program loads at once


class Splits(NamedTuple):
    """How contexts are divided. A row is cut into `fill` shares, or more so that none is long."""

    number: int  # programs for each row and KV head: no row has more shares
    fill: int  # how many a row should have, so that the rows fill the chip
    min_share: int = MIN_SHARE  # tokens
    long_share: int = LONG_SHARE


@jit
def _share(
    context, splits, fill, min_tiles, long_tiles, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """First visible tile of a context, number of tiles, tiles of one share."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // BLOCK_N
    tiles = tl.cdiv(context, BLOCK_N) - first
    share = tl.maximum(tl.minimum(tl.cdiv(tiles, fill), long_tiles), min_tiles)
    return first, tiles, tl.maximum(share, tl.cdiv(tiles, splits))


@jit(
    do_not_specialize=("fill", "min_tiles", "long_tiles"),
    do_not_specialize_on_alignment=paged.INDICES,
)
def _decode_kernel(
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
    row_ids_ptr,  # [n] rows of the batch
    out_ptr,  # [T, H, D], contiguous
    partial_ptr,  # [n, NUM_KV_HEADS, splits, GROUP, D] float32
    partial_log_ptr,  # [n, NUM_KV_HEADS, splits, GROUP] float32
    counters_ptr,  # [n, NUM_KV_HEADS] int32: zeros, and again afterwards
    q_stride_token,
    q_stride_head,
    table_stride,
    inner_scale,
    outer_scale,
    fill,
    min_tiles,
    long_tiles,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    LOADED: tl.constexpr,
):
    SCALED: tl.constexpr = key_scale_ptr is not None
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    row = tl.load(row_ids_ptr + tl.program_id(0))
    context = tl.load(context_len_ptr + row)
    first, tiles, share = _share(context, splits, fill, min_tiles, long_tiles, WINDOW, BLOCK_N)
    begin = split * share
    if (begin >= tiles) & (split > 0):  # the first one writes, even if there is no context
        return
    token = tl.load(query_start_ptr + row).to(tl.int64)
    table = table_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride

    index = tl.arange(0, BLOCK_M)
    used = index < GROUP
    query_head = head * GROUP + index
    numbers = tl.arange(0, D_PADDED)
    inside = used[:, None] & (numbers < D)[None, :]
    pointers = q_ptr + token * q_stride_token + (query_head * q_stride_head)[:, None]
    query = tl.load(pointers + numbers[None, :], mask=inside, other=0.0)

    accumulator = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # a token that the first split has seen, with a score and no value
        sinks = tl.load(sinks_ptr + query_head, mask=used, other=0.0)
        top = tl.where(split == 0, sinks.to(tl.float32) * 1.4426950408889634, top)
        total += tl.where(split == 0, 1.0, 0.0)
    position = tl.zeros((BLOCK_M,), tl.int32) + context - 1
    accumulator, total, top = attend(
        accumulator, total, top, query, position,
        (first + begin) * BLOCK_N, (first + tl.minimum(begin + share, tiles)) * BLOCK_N, context,
        keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, table, head,
        inner_scale, outer_scale, True, WINDOW, CAPPED, SCALED,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, D, D_PADDED,
    )  # fmt: skip

    result = accumulator / tl.where(total > 0.0, total, 1.0)[:, None]
    if tiles <= share:
        place = (token * NUM_KV_HEADS * GROUP + query_head) * D
        out = out_ptr + place[:, None] + numbers[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), inside)
    else:
        pair = tl.program_id(0) * NUM_KV_HEADS + head
        first_vector = pair.to(tl.int64) * splits * GROUP
        place = first_vector + split * GROUP + index
        tl.store(partial_ptr + (place * D)[:, None] + numbers[None, :], result, inside)
        tl.store(partial_log_ptr + place, top + tl.log2(total), used)
        # What all threads have stored is visible to whoever sees the count (release, acquire).
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel")
        shares = tl.cdiv(tiles, share)
        if arrived == shares - 1:
            tl.store(counters_ptr + pair, 0)
            vector = tl.arange(0, GROUP_PADDED)
            whole = paged.combined(
                # A head that is not there repeats the last one.
                partial_ptr, partial_log_ptr, first_vector + tl.minimum(vector, GROUP - 1),
                GROUP, shares, D, D_PADDED, GROUP_PADDED, LOADED,
            )  # fmt: skip
            out = out_ptr + (token * NUM_KV_HEADS + head) * GROUP * D
            there = (vector < GROUP)[:, None] & (numbers < D)[None, :]
            vectors = out + (vector * D)[:, None] + numbers[None, :]
            tl.store(vectors, whole.to(out_ptr.dtype.element_ty), there)


def splits_of(
    num_rows: int, num_kv_heads: int, max_context_len: int, window: int, chip: Chip
) -> Splits:
    """How to divide contexts of at most `max_context_len` so that they fill a chip."""
    longest = min(max_context_len, window) if window else max_context_len
    programs = max(1, num_rows * num_kv_heads)
    fill = -(-PROGRAMS * chip.multiprocessors // programs)
    number = min(-(-longest // LONG_SHARE), MAX_PROGRAMS * chip.multiprocessors // programs)
    number = min(max(number, fill), -(-longest // MIN_SHARE), MAX_SPLITS)
    return Splits(max(1, number), fill)


def block_n_of(head_dim: int, dtype: torch.dtype) -> int:
    """Tokens of a tile: 16 KiB of keys, so that two programs have 128 KiB on their way."""
    return min(128, max(16, (16 << 10) // (paged.padded(head_dim) * dtype.itemsize)))


def combination(group: int, head_dim: int) -> dict[str, int]:
    """The constants of `paged.combined`."""
    group_padded = triton.next_power_of_2(group)
    loaded = max(1, min(32, COMBINED_NUMBERS // (group_padded * paged.padded(head_dim))))
    return {"GROUP_PADDED": group_padded, "LOADED": loaded}


def _paged_decode(
    t: Tensors,
    row_ids: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    splits: Splits,
) -> None:
    """Attention of the listed rows, of one query token each, into `out`; others it leaves.

    A row whose context is 0 gets zeros.

    Args:
        t: see `penstock.kernels.paged.Tensors`.
        row_ids: [n] int32, rows of the batch.
        counters: [n * Hkv] int32 or more, zeros; they are zeros again when this is done.
        out: [T, H, D], contiguous.
        window: a query sees itself and the window - 1 tokens before; 0: all before.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0: they stay.
        splits: how contexts are divided.
    """
    num_heads, head_dim = t.q.shape[1:]
    num_kv_heads, block_size = t.keys.shape[1:3]
    group, num_rows = num_heads // num_kv_heads, len(row_ids)
    block_m = max(16, triton.next_power_of_2(group))
    block_n = block_n_of(head_dim, t.q.dtype)
    assert t.q.stride(2) == 1
    assert all(x.is_contiguous() for x in (t.keys, t.values, out))
    assert len(counters) >= num_rows * num_kv_heads
    if num_rows == 0:
        return
    inner_scale, outer_scale = paged.factors(scale, soft_cap)
    shape = (num_rows, num_kv_heads, splits.number if splits.number > 1 else 0, group)
    _decode_kernel[(num_rows, num_kv_heads, splits.number)](
        *t,
        row_ids,
        out,
        torch.empty((*shape, head_dim), dtype=torch.float32, device=t.q.device),
        torch.empty(shape, dtype=torch.float32, device=t.q.device),
        counters,
        t.q.stride(0),
        t.q.stride(1),
        t.block_table.stride(0),
        inner_scale,
        outer_scale,
        splits.fill,
        max(1, splits.min_share // block_n),
        max(1, splits.long_share // block_n),
        WINDOW=window,
        CAPPED=soft_cap > 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8 if block_m * head_dim > 8192 else 4,
        num_stages=3,
        **paged.sizes(group, num_kv_heads, block_size, head_dim),
        **combination(group, head_dim),
    )


def reference(
    t: Tensors,
    row_ids: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    splits: Splits,
) -> None:
    """The same in torch, row by row and in one piece."""
    paged.attend_rows(t, row_ids.tolist(), out, scale, window, soft_cap)


def samples(device: torch.device) -> Iterator[Sample]:
    """Rows of one token and longer ones, which stay; splits that some rows do not need."""
    b16, f16 = torch.bfloat16, torch.float16
    ragged = (1, 3, 1, 1), (1, 9, 300, 130)
    cases = [
        (Case("plain", *ragged), 1),
        (Case("pages of one token", *ragged, block_size=1, num_heads=7, num_kv_heads=1), 3),
        (Case("one block holds a tile", *ragged, block_size=128, num_kv_heads=4), 2),
        (Case("pages of 5", *ragged, block_size=5, num_heads=6, window=100), 2),
        (Case("large pages", *ragged, block_size=256, dtype=f16, soft_cap=2.0), 4),
        (Case("bf16", *ragged, dtype=b16, head_dim=20, has_sinks=True), 3),
        (Case("int8", *ragged, pages=torch.int8, window=140, soft_cap=5.0), 5),
        (Case("bf16, int8", *ragged, dtype=b16, pages=torch.int8, block_size=128), 2),
        (Case("fp16, fp8", *ragged, dtype=f16, pages=torch.float8_e4m3fn, block_size=7), 3),
        (Case("fp8", *ragged, dtype=b16, pages=torch.float8_e4m3fn, head_dim=24), 2),
        (Case("window of one", *ragged, window=1, has_sinks=True), 1),
        (Case("more splits than are loaded at once", (1,), (700,), head_dim=256), 20),
        (Case("many heads", (1, 1), (3, 40), num_heads=40, num_kv_heads=1, head_dim=8), 1),
    ]
    for case, splits in cases:
        t = paged.case_tensors(case, device)
        decoded = [row for row, length in enumerate(case.lengths) if length == 1][::-1]
        row_ids = torch.tensor(decoded, dtype=torch.int32, device=device)
        out = torch.zeros(t.q.shape, dtype=case.dtype, device=device)
        counters = torch.zeros(len(decoded) * case.num_kv_heads, dtype=torch.int32, device=device)
        kwargs = {**case.options(), "splits": Splits(splits, splits, min_share=32)}
        yield case.label, (t, row_ids, counters, out), kwargs, case.tolerance


paged_decode = Op(_paged_decode, reference, samples)


def compilations() -> Iterator[Compilation]:
    """For 16-bit and 8-bit pages at the usual sizes, with each feature."""
    bf16, fp16 = "*bf16:16", "*fp16:16"
    for label, pages, head_dim, group, block_size, block_n, changes in (
        ("D=128", bf16, 128, 4, 16, 64, {}),
        ("D=128, window and cap", bf16, 128, 7, 64, 64, {"CAPPED": True, "WINDOW": 4096}),
        ("D=64, sinks", bf16, 64, 8, 32, 128, {"sinks_ptr": "*fp32:16"}),
        ("D=256", bf16, 256, 2, 1, 32, {}),
        ("D=128, int8", "*i8:16", 128, 4, 16, 64, {}),
        ("D=128, fp8", "*fp8e4nv:16", 128, 4, 16, 64, {}),
        ("D=128, fp16, fp8", "*fp8e4nv:16", 128, 4, 16, 64, {"q_ptr": fp16, "out_ptr": fp16}),
    ):
        arguments = paged.arguments(_decode_kernel, bf16, pages, group, block_size, head_dim)
        arguments |= {"BLOCK_M": 16, "BLOCK_N": block_n}
        arguments |= {**combination(group, head_dim), **changes}
        yield paged.compilation(f"paged_decode {label}", _decode_kernel, arguments)

"""Paged attention: the references against a naive loop, the kernels where samples do not reach."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import paged, paged_prefill
from penstock.kernels.chip import AMPERE, HOPPER, SMALL, Chip
from penstock.kernels.op import triton_problem
from penstock.kernels.paged import Case, Tensors, case_tensors
from penstock.kernels.paged_decode import Splits, paged_decode, splits_of
from penstock.kernels.paged_prefill import Tiling, rows_of_tile, tiles, tiling_for

CPU = torch.device("cpu")
TILE = Tiling(16, 16, 4, 2)
needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=f"{triton_problem()}")


def naive(t: Tensors, row: int, scale: float, window: int, soft_cap: float) -> torch.Tensor:
    """One row's queries, [n, H, D] in float64: a loop over queries, heads and tokens.

    It has nothing in common with what is tested.
    """
    start, stop = int(t.query_start[row]), int(t.query_start[row + 1])
    context, block_size = int(t.context_len[row]), t.keys.shape[2]
    num_heads, group = t.q.shape[1], t.q.shape[1] // t.keys.shape[1]
    out = torch.zeros(stop - start, num_heads, t.q.shape[2], dtype=torch.float64)

    def vector(
        pages: torch.Tensor, scales: torch.Tensor | None, token: int, head: int
    ) -> torch.Tensor:
        block = int(t.block_table[int(t.rows[row]), token // block_size])
        found = pages[block, head, token % block_size].double()
        return found if scales is None else found * scales[block, head, token % block_size].double()

    for query in range(start, stop):
        position = context - (stop - query)
        oldest = max(0, position - window + 1) if window else 0
        for head in range(num_heads):
            scores, vectors = [], []
            for token in range(oldest, position + 1):
                key = vector(t.keys, t.key_scale, token, head // group)
                score = float(t.q[query, head].double() @ key) * scale
                scores.append(soft_cap * math.tanh(score / soft_cap) if soft_cap else score)
                vectors.append(vector(t.values, t.value_scale, token, head // group))
            sinks = [] if t.sinks is None else [float(t.sinks[head])]
            highest = max(scores + sinks)
            weights = [math.exp(score - highest) for score in scores]
            total = sum(weights) + sum(math.exp(sink - highest) for sink in sinks)
            for weight, value in zip(weights, vectors, strict=True):
                out[query - start, head] += weight / total * value
    return out


def decode(t: Tensors, rows: list[int], splits: Splits, **options: Any) -> torch.Tensor:
    counters = torch.zeros(len(rows) * t.keys.shape[1], dtype=torch.int32, device=t.q.device)
    out = torch.zeros(t.q.shape, dtype=t.q.dtype, device=t.q.device)
    row_ids = torch.tensor(rows, dtype=torch.int32, device=t.q.device)
    paged_decode.launch(*t, row_ids, counters, out, splits=splits, **options)
    assert not counters.any()
    return out


def prefill(t: Tensors, lengths: list[int], **options: Any) -> torch.Tensor:
    group = t.q.shape[1] // t.keys.shape[1]
    found = tiles(lengths, TILE.block_m // group)
    listed = torch.tensor(found, dtype=torch.int32, device=t.q.device).reshape(-1, 2)
    out = torch.zeros(t.q.shape, dtype=t.q.dtype, device=t.q.device)
    places = (listed[:, 0].contiguous(), listed[:, 1].contiguous())
    paged_prefill.paged_prefill.launch(
        *t, *places, out, block_m=TILE.block_m, tiling=TILE, **options
    )
    return out


CASES = [
    Case("plain", (3, 1), (5, 7), num_heads=2, num_kv_heads=1, head_dim=8, block_size=3),
    Case("window", (4, 2), (9, 3), head_dim=6, block_size=1, window=3),
    Case("cap and sinks", (2, 1), (6, 2), head_dim=8, soft_cap=1.5, has_sinks=True),
    Case("int8", (2, 2), (6, 2), head_dim=8, pages=torch.int8, window=2, has_sinks=True),
    Case("fp8", (2,), (6,), num_heads=3, num_kv_heads=1, pages=torch.float8_e4m3fn),
    Case("bf16", (3,), (6,), dtype=torch.bfloat16, soft_cap=30.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_oracle_is_attention(case: Case) -> None:
    t = case_tensors(case, CPU)
    for row in range(len(case.lengths)):
        expected = naive(t, row, **case.options())
        actual = paged.attend_row(t, row, **case.options())
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_references_write_their_rows_and_no_others() -> None:
    case = Case("rows", (2, 1, 3, 1), (4, 9, 3, 1))
    t = case_tensors(case, CPU)
    options = {"scale": 0.3, "window": 0, "soft_cap": 0.0}
    by_row = [paged.attend_row(t, row, **options) for row in range(4)]
    out = torch.zeros(t.q.shape)
    counters = torch.zeros(8, dtype=torch.int32)
    row_ids = torch.tensor([3, 1], dtype=torch.int32)
    paged_decode.reference(*t, row_ids, counters, out, splits=Splits(1, 16), **options)
    zeros = torch.zeros_like
    assert torch.equal(out, torch.cat([zeros(by_row[0]), by_row[1], zeros(by_row[2]), by_row[3]]))
    listed = torch.tensor(tiles([2, 1, 3, 1], 2), dtype=torch.int32)
    paged_prefill.reference(*t, listed[:, 0], listed[:, 1], out, block_m=4, **options)
    assert torch.equal(out, torch.cat(by_row))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small batches of every shape."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    contexts = [length + draw(st.integers(0, 30)) for length in lengths]
    num_kv_heads = draw(st.integers(1, 2))
    return Case(
        label=f"drawn {draw(st.integers(0, 9))}",
        lengths=tuple(lengths),
        contexts=tuple(contexts),
        num_heads=num_kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(4, 12)),
        block_size=draw(st.sampled_from([1, 2, 7, 16, 48])),
        pages=draw(st.sampled_from([None, torch.int8, torch.float8_e4m3fn])),
        window=draw(st.sampled_from([0, 1, 5, 17])),
        soft_cap=draw(st.sampled_from([0.0, 2.0])),
        has_sinks=draw(st.booleans()),
    )


@needs_triton
@settings(max_examples=12)
@given(case=cases(), splits=st.integers(1, 4))
def test_kernels_compute_what_the_oracle_does(case: Case, splits: int) -> None:
    t = case_tensors(case, CPU)
    lengths = list(case.lengths)
    ones = [row for row, length in enumerate(lengths) if length == 1]
    out = prefill(t, lengths, **case.options())
    out += decode(t, ones, Splits(splits, 16), **case.options())
    oracle = [paged.attend_row(t, row, **case.options()) for row in range(len(lengths))]
    torch.testing.assert_close(out, torch.cat(oracle), rtol=1e-4, atol=1e-5)


@needs_triton
def test_long_rows_are_split_and_short_ones_are_not(device: torch.device) -> None:
    """Counters that start too low: no program takes itself for the last, so none puts together."""
    case = Case("splits", (1, 1, 1), (700, 100, 256), num_kv_heads=1)
    t = case_tensors(case, device)
    counters = torch.full((3,), -1000, dtype=torch.int32, device=device)
    out = torch.zeros(t.q.shape, device=device)
    row_ids = torch.arange(3, dtype=torch.int32, device=device)
    paged_decode.launch(*t, row_ids, counters, out, splits=Splits(4, 128), **case.options())
    assert (counters + 1000).tolist() == [3, 0, 2], "shares of 2 tiles, 128 tokens each"
    assert [bool(row.any()) for row in out] == [False, True, False]


@needs_triton
def test_a_row_without_context_gets_zeros(device: torch.device) -> None:
    t = case_tensors(Case("empty", (1, 1), (4, 4)), device)
    t.context_len[1] = 0
    out = torch.full(t.q.shape, 7.0, device=device)
    row_ids = torch.arange(2, dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int32, device=device)
    options = {"scale": 1.0, "window": 0, "soft_cap": 0.0, "splits": Splits(2, 16)}
    paged_decode.launch(*t, row_ids, counters, out, **options)
    assert not out[1].any()
    assert out[0].any()


@needs_triton
@pytest.mark.parametrize("length", [1, 20])
def test_what_the_window_does_not_reach_is_not_read(length: int, device: torch.device) -> None:
    """Not even multiplied by zero: whole tiles are left out."""
    case = Case("far", (length,), (400,), block_size=16, window=30)
    t = case_tensors(case, device)
    first_seen = 400 - length - 30 + 1
    unread = t.block_table[int(t.rows[0]), : (first_seen // 128 * 128) // 16].long()
    assert len(unread) >= 16
    t.values[unread] = torch.nan
    options = case.options()
    if length == 1:
        out = decode(t, [0], Splits(2, 16), **options)
    else:
        out = prefill(t, [length], **options)
    t.values[unread] = 0.0
    torch.testing.assert_close(out, paged.attend_row(t, 0, **options), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("length", [1, 2])
def test_pages_may_be_larger_than_32_bits_address(length: int) -> None:
    """Memory that the system hands out where it is touched; two blocks of it are."""
    small = case_tensors(Case("far away", (length,), (9,), num_kv_heads=2, block_size=8), CPU)
    shape = (2**31 // (2 * 8 * 16) + 3, *small.keys.shape[1:])
    far = [torch.from_numpy(np.zeros(shape, np.int8)) for _ in range(2)]
    scale = torch.from_numpy(np.zeros(shape[:3], np.float32))
    blocks = small.block_table[int(small.rows[0]), :2].long()
    for there, here in zip(far, (small.keys, small.values), strict=True):
        there[-2:] = (here[blocks] * 40).to(torch.int8)
    scale[-2:] = 1 / 40
    small.block_table[int(small.rows[0]), :2] = torch.arange(shape[0] - 2, shape[0]).int()
    t = small._replace(keys=far[0], values=far[1], key_scale=scale, value_scale=scale)
    options = {"scale": 0.25, "window": 0, "soft_cap": 0.0}
    if length == 1:
        out = decode(t, [0], Splits(1, 16), **options)
    else:
        out = prefill(t, [length], **options)
    torch.testing.assert_close(out, paged.attend_row(t, 0, **options), rtol=1e-4, atol=1e-5)


def test_tiles_cover_every_query_once_and_late_ones_come_first() -> None:
    lengths = [5, 1, 8, 2, 1]
    found = tiles(lengths, 4)
    assert sorted(found) == [(0, 0), (0, 4), (2, 0), (2, 4), (3, 0)]
    starts = [start for _, start in found]
    assert starts == sorted(starts, reverse=True)
    assert tiles([1, 1], 4) == []


@pytest.mark.parametrize("chip", [HOPPER, AMPERE, SMALL], ids=["hopper", "ampere", "small"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("pages", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tilings_fit(
    dtype: torch.dtype, pages: torch.dtype | None, head_dim: int, chip: Chip
) -> None:
    stored = pages or dtype
    for longest in (2, 512):
        block_m = rows_of_tile(longest, 4, head_dim, chip)
        cut = tiling_for(block_m, head_dim, dtype, stored, chip)
        padded = max(16, 1 << (head_dim - 1).bit_length())
        tile = cut.block_n * padded
        needed = block_m * padded * dtype.itemsize + 2 * cut.num_stages * tile * stored.itemsize
        assert needed <= chip.shared_memory
        assert cut.block_n >= 16
        assert block_m % 64 == 0


def test_a_token_of_many_heads_fits_its_tile() -> None:
    assert rows_of_tile(2, 71, 64, HOPPER) == 128
    assert rows_of_tile(1, 200, 64, HOPPER) == 256


def test_splits_fill_the_chip() -> None:
    one_row = splits_of(1, 8, 131072, 0, HOPPER)
    assert 2 * 132 <= 8 * one_row.number <= 3 * 132
    assert splits_of(1, 8, 100, 0, HOPPER).number == 1, "a program has work to do"
    assert splits_of(1, 8, 131072, 1024, HOPPER).number == 8, "more than the window is not seen"
    assert splits_of(64, 8, 4096, 0, HOPPER).number == 1
    many = splits_of(64, 8, 131072, 0, HOPPER)
    assert 1 < many.number <= 4, "one long row among many does not keep them waiting"
    assert many.min_share > one_row.min_share
    assert splits_of(512, 8, 131072, 0, HOPPER).number == 1

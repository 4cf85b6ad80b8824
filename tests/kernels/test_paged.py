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
from penstock.kernels.paged_prefill import Tiling, rows_of_tile, schedule, tiling_for

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
    paged_decode.launch(t, row_ids, counters, out, splits=splits, **options)
    assert not counters.any()
    return out


def prefill(
    t: Tensors, lengths: list[int], *, min_share: int = 4096, tile: Tiling = TILE, **options: Any
) -> torch.Tensor:
    group, num_kv_heads = t.q.shape[1] // t.keys.shape[1], t.keys.shape[1]
    contexts = t.context_len.tolist()
    work, num_shares = schedule(lengths, contexts, tile.block_m // group, 1e3, min_share)
    counters = torch.zeros(num_shares * num_kv_heads, dtype=torch.int32, device=t.q.device)
    out = torch.zeros(t.q.shape, dtype=t.q.dtype, device=t.q.device)
    paged_prefill.paged_prefill.launch(
        t,
        torch.from_numpy(work).to(t.q.device),
        counters,
        out,
        block_m=tile.block_m,
        num_shares=num_shares,
        tiling=tile,
        min_share=min_share,
        **options,
    )
    assert not counters.any()
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
    paged_decode.reference(t, row_ids, counters, out, splits=Splits(1, 1), **options)
    zeros = torch.zeros_like
    assert torch.equal(out, torch.cat([zeros(by_row[0]), by_row[1], zeros(by_row[2]), by_row[3]]))
    work = torch.from_numpy(schedule([2, 1, 3, 1], [4, 9, 3, 1], 2, 1)[0])
    paged_prefill.reference(t, work, counters, out, block_m=4, **options)
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
@given(case=cases(), splits=st.integers(1, 4), min_share=st.sampled_from([16, 32, 4096]))
def test_kernels_compute_what_the_oracle_does(case: Case, splits: int, min_share: int) -> None:
    t = case_tensors(case, CPU)
    lengths = list(case.lengths)
    ones = [row for row, length in enumerate(lengths) if length == 1]
    out = prefill(t, lengths, min_share=min_share, **case.options())
    out += decode(t, ones, Splits(splits, splits, 16), **case.options())
    oracle = [paged.attend_row(t, row, **case.options()) for row in range(len(lengths))]
    torch.testing.assert_close(out, torch.cat(oracle), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    ("splits", "shares"),
    [(Splits(4, 4, 128), [3, 0, 2]), (Splits(4, 1, 128, 256), [3, 0, 0]), (Splits(6, 1), [0] * 3)],
    ids=["to fill", "because they are long", "not at all"],
)
def test_long_rows_are_split_and_short_ones_are_not(
    splits: Splits, shares: list[int], device: torch.device
) -> None:
    """Counters that start too low: no program takes itself for the last, so none puts together."""
    case = Case("splits", (1, 1, 1), (700, 100, 256), num_kv_heads=1)
    t = case_tensors(case, device)
    counters = torch.full((3,), -1000, dtype=torch.int32, device=device)
    out = torch.zeros(t.q.shape, device=device)
    row_ids = torch.arange(3, dtype=torch.int32, device=device)
    paged_decode.launch(t, row_ids, counters, out, splits=splits, **case.options())
    assert (counters + 1000).tolist() == shares, "in tiles of 128 tokens"
    assert [bool(row.any()) for row in out] == [not count for count in shares]


@needs_triton
@pytest.mark.parametrize(("window", "counts"), [(0, [5, 0, 0]), (100, [4, 0, 0])])
def test_long_tiles_are_split_and_short_ones_are_not(
    window: int, counts: list[int], device: torch.device
) -> None:
    """As above: 3 tokens behind 222 others, 15 tiles of 16; a window leaves 8."""
    case = Case("shared tile", (3, 2), (225, 40), num_kv_heads=1, window=window)
    t = case_tensors(case, device)
    found, num_shares = schedule(case.lengths, case.contexts, 4, 1000, 32)
    assert num_shares == 7
    assert found.tolist() == [*([0, 0, split, 7] for split in range(7)), [1, 0, 0, 1]]
    counters = torch.full((8,), -1000, dtype=torch.int32, device=device)
    out = torch.zeros(t.q.shape, device=device)
    work = torch.from_numpy(found).to(device)
    options = {"block_m": 16, "num_shares": num_shares, "tiling": TILE, "min_share": 32}
    paged_prefill.paged_prefill.launch(t, work, counters, out, **options, **case.options())
    assert (counters[[0, 7, 6]] + 1000).tolist() == counts
    assert [bool(token.any()) for token in out] == [False] * 3 + [True] * 2


@needs_triton
@pytest.mark.parametrize("length", [1, 3], ids=["decode", "prefill"])
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("pages", [torch.float16, torch.int8, torch.float8_e4m3fn])
def test_what_others_left_in_pages_is_not_seen(
    pages: torch.dtype, block_size: int, length: int, device: torch.device
) -> None:
    """Neither in block 0, which the table's unread entries count as, nor in the row's last block.

    There lie infinities and NaN: a request whose numbers overflowed harms itself and nobody else.
    """
    kind = None if pages == torch.float16 else pages
    case = Case("left", (length,), (9,), block_size=block_size, dtype=torch.float16, pages=kind)
    t = case_tensors(case, device)
    own = t.block_table[int(t.rows[0]), : -(-9 // block_size)].tolist()
    assert 0 not in own
    ends = [(0, slice(None))] + ([(own[-1], slice(9, None))] if block_size > 9 else [])
    numbers = t[1:3] if t.value_scale is None else t[3:5]
    for block, free in ends:
        assert not any(x[block, :, free].isfinite().any() for x in numbers if x is not None)
    if length == 1:
        out = decode(t, [0], Splits(1, 1), **case.options())
    else:
        out = prefill(t, [length], **case.options())
    expected = paged.attend_row(t, 0, **case.options())
    torch.testing.assert_close(out.float(), expected, rtol=4e-3, atol=4e-3)


@needs_triton
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 6e4])
@pytest.mark.parametrize("pages", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_probabilities_of_scaled_values_count(
    dtype: torch.dtype, pages: torch.dtype, magnitude: float
) -> None:
    """A sink leads 1500 tokens by e^9, and its value is small, so that theirs make up the output.

    Their probabilities of 1e-4, times scales of 1/448 of the values, are nothing in float16; and
    the largest values of float16 times anything above 1 are infinite.
    """
    case = Case("peak", (1, 2), (1500, 1500), 1, 1, 32, dtype=dtype, pages=pages)
    t = case_tensors(case, CPU)
    generator = torch.Generator().manual_seed(1)
    t.q.zero_()[..., 0] = 1.0
    largest = 127.0 if pages == torch.int8 else 448.0
    keys = torch.zeros(t.keys.shape)
    values = 0.8 + 0.2 * torch.rand(t.values.shape, generator=generator)
    sinks = t.block_table[t.rows.long(), 0].long()
    keys[sinks, :, 0, 0] = 9.0
    values[sinks, :, 0] = -0.01
    assert t.key_scale is not None
    assert t.value_scale is not None
    t.key_scale.fill_(9.0 / largest)
    t.keys.copy_(keys * largest / 9.0)
    t.value_scale.copy_(values.abs().amax(-1) * magnitude / largest)
    stored = values * magnitude / t.value_scale[..., None]
    t.values.copy_(stored.round() if pages == torch.int8 else stored)
    options = {"scale": 1.0, "window": 0, "soft_cap": 0.0}
    out = decode(t, [0], Splits(3, 3), **options)
    out += prefill(t, [1, 2], min_share=512, tile=Tiling(16, 128, 4, 2), **options)
    expected = torch.cat([paged.attend_row(t, row, **options) for row in range(2)])
    torch.testing.assert_close(out.float(), expected, rtol=case.tolerance / 2, atol=0.0)


@needs_triton
def test_a_row_without_context_gets_zeros(device: torch.device) -> None:
    t = case_tensors(Case("empty", (1, 1), (4, 4)), device)
    t.context_len[1] = 0
    out = torch.full(t.q.shape, 7.0, device=device)
    row_ids = torch.arange(2, dtype=torch.int32, device=device)
    counters = torch.zeros(4, dtype=torch.int32, device=device)
    options = {"scale": 1.0, "window": 0, "soft_cap": 0.0, "splits": Splits(2, 2, 16)}
    paged_decode.launch(t, row_ids, counters, out, **options)
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
        out = decode(t, [0], Splits(2, 2, 16), **options)
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
        out = decode(t, [0], Splits(1, 1), **options)
    else:
        out = prefill(t, [length], **options)
    torch.testing.assert_close(out, paged.attend_row(t, 0, **options), rtol=1e-4, atol=1e-5)


def test_work_covers_every_query_once_and_the_longest_comes_first() -> None:
    lengths, contexts = [5, 1, 8, 2, 1], [6, 900, 8, 300, 1]
    work, num_shares = schedule(lengths, contexts, 4, 3, 64)
    assert num_shares == 2
    assert work.tolist() == [
        *([3, 0, 0, 2], [3, 0, 1, 2]),  # nearly all there is to do, for 3 programs
        *([2, 4, 0, 1], [0, 4, 0, 1], [0, 0, 0, 1], [2, 0, 0, 1]),
    ]
    assert schedule([1, 1], [9, 9], 4, 100)[0].shape == (0, 4)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize(
    ("lengths", "contexts", "least", "most"),
    [
        ([64], [32768], 8, 32),  # the next turn of a long chat
        ([2], [131072], 16, 32),
        ([64], [900], 1, 1),
        ([2048], [2048], 1, 1),  # enough tiles
        ([8192], [131072], 1, 1),
        ([1500, *[1] * 50, 64], [1500, *[700] * 50, 131072], 7, 32),  # it would end last
        ([64] * 64, [4096] * 64, 1, 1),
    ],
)
def test_shares_fill_the_chip(
    lengths: list[int], contexts: list[int], least: int, most: int, num_kv_heads: int
) -> None:
    programs = paged_prefill.programs_at_once(128, 128, num_kv_heads, HOPPER)
    assert programs == 132 / num_kv_heads
    work, num_shares = schedule(lengths, contexts, 32, programs)
    assert num_shares <= programs, "what they leave has room"
    found = work[:, 3].max()
    assert most == 1 or found >= least
    assert found <= most or num_kv_heads < 8
    assert (work[:num_shares, 3] > 1).all()
    assert (work[num_shares:, 3] == 1).all()


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
    assert one_row.fill == one_row.number
    assert splits_of(1, 8, 100, 0, HOPPER).number == 1, "a program has work to do"
    assert splits_of(1, 8, 131072, 1024, HOPPER).number == 8, "more than the window is not seen"


@pytest.mark.parametrize(
    ("num_rows", "num_kv_heads", "longest", "number", "fill"),
    [
        (16, 8, 131072, 16, 3),
        (24, 8, 131072, 11, 2),
        (32, 8, 131072, 8, 2),
        (33, 8, 131072, 8, 1),
        (40, 8, 131072, 6, 1),
        (64, 8, 131072, 4, 1),
        (64, 8, 4096, 1, 1),
        (512, 8, 131072, 1, 1),
        (32, 1, 131072, 16, 9),
        (256, 1, 131072, 8, 2),
        (264, 1, 131072, 8, 1),
        (16, 8, 16384, 3, 3),
        (2, 8, 131072, 17, 17),
        (1, 1, 131072, 128, 264),
    ],
)
def test_a_long_row_never_has_more_to_do_where_there_are_fewer_rows(
    num_rows: int, num_kv_heads: int, longest: int, number: int, fill: int
) -> None:
    found = splits_of(num_rows, num_kv_heads, longest, 0, HOPPER)
    assert (found.number, found.fill) == (number, fill)
    assert splits_of(num_rows + 1, num_kv_heads, longest, 0, HOPPER).number <= number
    assert number == 1 or num_rows * num_kv_heads * number <= 16 * 132, "scratch has room"


@needs_triton
def test_no_number_of_rows_needs_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is compiled in the middle of serving keeps everybody waiting for a second."""
    constants: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: constants.append(kwargs)

    monkeypatch.setattr("penstock.kernels.paged_decode._decode_kernel", Recorder())
    for num_rows in (1, 7, 64, 200):
        t = case_tensors(Case("rows", (1,) * num_rows, (3,) * num_rows), CPU)
        row_ids = torch.arange(num_rows, dtype=torch.int32)
        counters = torch.zeros(2 * num_rows, dtype=torch.int32)
        splits = splits_of(num_rows, 2, 131072, 0, HOPPER)
        paged_decode.launch(
            t,
            row_ids,
            counters,
            t.q.contiguous(),
            scale=0.5,
            window=0,
            soft_cap=0.0,
            splits=splits,
        )
    assert len(constants) == 4
    assert all(found == constants[0] for found in constants)

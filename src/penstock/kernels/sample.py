"""Tokens from logits, with temperature, min-p, top-k, top-p and one random number a row.

For row r of `rows`, with x = logits, t = temperature[r] and weights w = exp((x - max x) / t):

    limit = min_p[r];  limit = max(limit, the top_k[r]-th largest w);
    limit = max(limit, the largest w of which those from it up have top_p[r] of the mass left);
    the first token, by id, at which the sum of the w >= limit passes uniform(seeds[r]) of it all

so that equals of what stays stay too. Below 1e-5 a temperature is greedy: the largest logit, the
lowest id of several. So is a row whose largest logit is not finite; NaN is larger than any number.
`penstock.sampling.host` means the same. The random number is SplitMix64 (Steele, Lea, Flood 2014)
of the seed and the position, counter based.

A program has 4096 columns of a row; what it finds, the next kernel reads. One pass over the logits
gives the largest, which is all that greedy rows need; for rows that are drawn from, 6 passes find
the limit of top-k and 6 that of top-p, if any row has them (`kernels.sample_limits`); one gives the
masses of the chunks, and a last program for each row looks into one chunk. Masses are integers,
weights in units of 2**-44, and so added up without error: the draw is exact for its limit. A row
never depends on others. Nothing waits for the host.

The size of the vocabulary and the distance of rows are compiled in as far as they are multiples of
16, and 16 bytes are loaded at once if they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from penstock.kernels.draws import GREEDY, SCALE, draw, relative_weights, truncate
from penstock.kernels.jit import INTERPRETED, jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample
from penstock.kernels.sample_limits import (
    NUM_PASSES,
    best_of,
    bits_of,
    is_drawn,
    logit_of,
    measure_kernel,
    narrowed,
    weights_of,
)

_CHUNK = 4096  # columns of a program
# Threads, of 8 columns each, and runs of them at once; the interpreter is slow by operations.
_LANES, _UNROLLED = (512, 1) if INTERPRETED else (128, 2)


@jit
def _units(weights, limit, SCALE: tl.constexpr):
    """The mass of each weight from `limit`, the bits of a float, up."""
    left = weights >= limit.to(tl.float32, bitcast=True)
    return tl.where(left, weights * SCALE, 0.0).to(tl.int64)


@jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit(do_not_specialize=["num_chunks"])
def _best_kernel(
    logits_ptr,  # [L, V]
    best_ptr,  # [L, chunks]
    logits_stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """The largest logit of a chunk, as an integer of which the larger is the larger logit.

    The upper 32 bits are those of the logit, ordered; the lower ones the column, downwards.
    """
    slot = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(
        logits_ptr + slot * logits_stride + columns,
        mask=columns < vocab_size,
        other=float("-inf"),
    ).to(tl.float32)
    key = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    key = tl.where(x != x, 0x7FFFFFFF, key ^ ((key >> 31) & 0x7FFFFFFF))
    best = (key.to(tl.int64) << 32) + (0xFFFFFFFF - columns.to(tl.int64))
    tl.store(best_ptr + slot * num_chunks + chunk, tl.max(best, axis=0))


@jit(do_not_specialize=["num_chunks", "num_all_passes"])
def _mass_kernel(
    logits_ptr,  # [L, V]
    rows_ptr,  # [L]
    temperature_ptr,  # [N], as the next three
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    best_ptr,  # [L, chunks]
    tables_ptr,  # [L, passes, 32]
    states_ptr,  # [L, passes, 2]
    limits_ptr,  # [L], the bits of the smallest weight that stays
    masses_ptr,  # [L, chunks]
    logits_stride,
    vocab_size,
    num_chunks,
    num_all_passes,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_PASSES: tl.constexpr,
):
    """What stays of a chunk."""
    slot = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(rows_ptr + slot)
    temperature = tl.load(temperature_ptr + row)
    peak = logit_of(best_of(best_ptr, slot, num_chunks, CHUNKS))
    if is_drawn(temperature, peak) == 0:
        return
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    is_ranked, is_nucleus = (top_k > 0) & (top_k < vocab_size), top_p < 1
    limit = bits_of(tl.load(min_p_ptr + row))
    if is_ranked | is_nucleus:
        last = (is_ranked.to(tl.int32) + is_nucleus.to(tl.int32)) * NUM_PASSES - 1
        place = slot * num_all_passes + last
        low, _ = narrowed(tables_ptr, states_ptr, place, NUM_PASSES - 1, top_p)
        limit = tl.maximum(limit, low)
    if chunk == 0:
        tl.store(limits_ptr + slot, limit)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    weights = weights_of(logits_ptr + slot * logits_stride, columns, vocab_size, peak, temperature)
    mass = tl.sum(_units(weights, limit, SCALE), axis=0)
    tl.store(masses_ptr + slot * num_chunks + chunk, mass)


@jit(do_not_specialize=["num_chunks"])
def _draw_kernel(
    logits_ptr,  # [L, V]
    rows_ptr,  # [L]
    positions_ptr,  # [L]
    temperature_ptr,  # [N]
    seeds_ptr,  # [N]
    best_ptr,  # [L, chunks]
    limits_ptr,  # [L]
    masses_ptr,  # [L, chunks]
    out_ptr,  # [L]
    logits_stride,
    vocab_size,
    num_chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The token of a row: its chunk by the masses, then its place in the chunk."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + slot)
    temperature = tl.load(temperature_ptr + row)
    best = best_of(best_ptr, slot, num_chunks, CHUNKS)
    peak = logit_of(best)
    if is_drawn(temperature, peak) == 0:
        tl.store(out_ptr + slot, (0xFFFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32))
        return

    chunks = tl.arange(0, CHUNKS)
    masses = tl.load(masses_ptr + slot * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
    step = (tl.load(positions_ptr + slot).to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    uniform = (_mix(_mix(seed) + step) >> 12) << 12  # 52 bits behind the point
    target = tl.umulhi(uniform, tl.sum(masses, axis=0).to(tl.uint64)).to(tl.int64)
    chunk = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    target -= tl.sum(tl.where(chunks < chunk, masses, 0), axis=0)

    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    weights = weights_of(logits_ptr + slot * logits_stride, columns, vocab_size, peak, temperature)
    units = _units(weights, tl.load(limits_ptr + slot), SCALE)
    place = tl.sum((tl.cumsum(units, axis=0) <= target).to(tl.int32), axis=0)
    tl.store(out_ptr + slot, chunk * CHUNK + place)


def _sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    out: torch.Tensor,
    *,
    num_searches: int | None = 2,
) -> None:
    """One token for each row, into `out` [L] int32.

    Args:
        logits: [L, V] float32, bfloat16 or float16, V < 2**19; not changed.
        rows: [L] int32, the places of the settings.
        positions: [L] int32, which of a seed's random numbers it is.
        temperature: [N] float32; below 1e-5 is greedy.
        top_k: [N] int32; 0 is no limit.
        top_p, min_p: [N] float32.
        seeds: [N] int64, the bits of 64-bit unsigned numbers.
        num_searches: how many of top-k and top-p the row that has most of them has, at least. None:
            all rows are greedy, which saves a launch.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, "a row lies in one piece"
    assert vocab_size < 2**19, "the mass of a row fits into 63 bits"
    chunk = min(_CHUNK, max(8, triton.next_power_of_2(vocab_size)))
    num_chunks = triton.cdiv(vocab_size, chunk)
    num_passes = (num_searches or 0) * NUM_PASSES
    best, masses = (logits.new_empty((num_rows, num_chunks), dtype=torch.int64) for _ in range(2))
    limits = logits.new_empty(num_rows, dtype=torch.int32)
    tables = logits.new_zeros((num_rows, num_passes, 32), dtype=torch.int64)
    states = logits.new_empty((num_rows, num_passes, 2), dtype=torch.int64)
    sizes = logits.stride(0), vocab_size, num_chunks
    inputs = logits, rows, temperature, top_k, top_p, min_p, best, tables, states
    grid = num_rows, num_chunks
    shape = {"CHUNKS": triton.next_power_of_2(num_chunks), "CHUNK": chunk, "SCALE": SCALE}
    searched = {**shape, "NUM_PASSES": NUM_PASSES}
    lanes = min(_LANES, chunk // 8)
    runs = {"LANES": lanes, "UNROLLED": min(_UNROLLED, chunk // (8 * lanes))}

    _best_kernel[grid](logits, best, *sizes, CHUNK=chunk)
    for index in range(num_passes):
        measure_kernel[grid](*inputs, *sizes, index, num_passes, **searched, **runs)
    if num_searches is not None:
        _mass_kernel[grid](*inputs, limits, masses, *sizes, num_passes, **searched)
    _draw_kernel[(num_rows,)](
        logits, rows, positions, temperature, seeds, best, limits, masses, out, *sizes, **shape
    )


def reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    out: torch.Tensor,
    *,
    num_searches: int | None = 2,
) -> None:
    """The same in torch, by sorting."""
    t = temperature[rows]
    x = logits.float()
    peak, best = x.max(dim=1)  # the first of equals; NaN is the largest
    drawn = (t >= GREEDY) & peak.isfinite()
    weights = relative_weights(x, t)
    truncate(weights, top_k[rows], top_p[rows], min_p[rows])
    out.copy_(torch.where(drawn, draw(weights, seeds[rows], positions), best))


def samples(device: torch.device) -> Iterator[Sample]:
    """Every setting, ties, rows without a distribution, rows with a gap between them, chunks."""
    generator = torch.Generator().manual_seed(5)
    settings = torch.tensor(
        [  # temperature, top-k, top-p, min-p
            [0.0, 0, 1.0, 0.0],
            [1.0, 0, 1.0, 0.0],
            [0.7, 7, 1.0, 0.0],
            [1.5, 0, 0.8, 0.0],
            [1.0, 50, 0.5, 0.05],
            [0.5, 10**6, 0.9, 0.0],
        ]
    )
    for label, vocab_size, places in (
        ("small", 13, [0, 1, 2, 3]),
        ("all settings", 300, [5, 0, 1, 2, 3, 4]),
        ("chunks", 2 * _CHUNK + 5, [4, 1]),
    ):
        num_rows = len(places)
        x = torch.randn(num_rows, vocab_size + 3, generator=generator).mul_(2).bfloat16()
        x[0, :vocab_size:3] = x[0].max()
        if label == "small":
            x[2, 5], x[3] = float("nan"), float("-inf")
        temperature, top_k, top_p, min_p = settings.T.contiguous().to(device)
        rows = torch.tensor(places, dtype=torch.int32, device=device)
        seeds = torch.randint(-(2**62), 2**62, (len(settings),), generator=generator).to(device)
        args = (
            (x.to(device) if label == "all settings" else x.to(device).float())[:, :vocab_size],
            rows,
            rows * 1000,
            *(temperature, top_k.int(), top_p, min_p, seeds),
            torch.full((num_rows,), -1, dtype=torch.int32, device=device),
        )
        yield label, args, {}, 0.0


sample = Op(_sample, reference, samples)


def compilations() -> Iterator[Compilation]:
    """For a vocabulary of 152k, of logits as models give them and as constraints leave them."""
    types = dict.fromkeys(("temperature", "top_p", "min_p"), "fp32")
    types |= dict.fromkeys(("best", "tables", "states", "masses", "seeds"), "i64")
    numbers = dict.fromkeys(("num_chunks", "index", "num_all_passes"), "i32")
    numbers |= dict.fromkeys(("logits_stride", "vocab_size"), "i32:16")
    fixed = {"CHUNKS": 64, "CHUNK": _CHUNK, "SCALE": SCALE, "NUM_PASSES": NUM_PASSES}
    fixed |= {"LANES": 128, "UNROLLED": 2}
    kernels = _best_kernel, measure_kernel, _mass_kernel, _draw_kernel
    for types["logits"], kernel in product(("bf16", "fp32"), kernels):
        names = kernel.arg_names
        signature = {
            name: f"*{types.get(name.removesuffix('_ptr'), 'i32')}:16"
            for name in names
            if name.endswith("_ptr")
        }
        signature |= {name: kind for name, kind in numbers.items() if name in names}
        constexprs = {name: value for name, value in fixed.items() if name in names}
        name = kernel.__name__.removesuffix("_kernel").lstrip("_")
        yield Compilation(f"sample {name} {types['logits']}", kernel, signature, constexprs)

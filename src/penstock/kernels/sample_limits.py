"""The smallest weight that min-p, top-k and top-p leave of a row: found by its bits.

Owns the search; `kernels.sample` says what for. The bits of positive floats are ordered as they
are, and a weight is at most 1.0, whose bits are below 2**30. A pass measures what reaches each of
32 thresholds, which is 5 bits more: it counts the weights (top-k), or adds them up (top-p), and the
largest threshold that `target` is reached from is where the next pass goes on. So a search takes 6
passes; a row with top-k and top-p needs two. A program has one chunk of a row, and none of its
columns if nothing in it reaches the lowest threshold, as after the first pass is the rule.
Invariant: a chunk's weights are added up in float32 in an order that is part of the kernel, the
same whatever else is computed; sums over chunks are of integers, so that the order of programs
cannot show.
"""

from __future__ import annotations

from penstock.kernels.jit import jit, tl

NUM_PASSES = 6


@jit
def best_of(best_ptr, slot, num_chunks, CHUNKS: tl.constexpr):
    """The largest of a row's chunks, see `kernels.sample`."""
    chunk = tl.arange(0, CHUNKS)
    best = tl.load(
        best_ptr + slot * num_chunks + chunk, mask=chunk < num_chunks, other=-9223372036854775808
    )
    return tl.max(best, axis=0)


@jit
def logit_of(best):
    """The logit in such a number."""
    key = (best >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def is_drawn(temperature, peak):
    return (temperature >= 1e-5) & (tl.abs(peak) < float("inf"))


@jit
def weights_of(logits_ptr, columns, vocab_size, peak, temperature):
    """Relative to the most likely token, whose weight is 1; 0 beyond the row."""
    x = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    return tl.exp((x.to(tl.float32) - peak) * tl.div_rn(1.0, temperature))


@jit
def bits_of(share):
    return tl.maximum(share.to(tl.int32, bitcast=True), 0)


@jit
def narrowed(tables_ptr, states_ptr, place, turn, top_p):
    """Lower bound (bits of a float) and target, after a pass: number `turn` of its search."""
    low = tl.load(states_ptr + place * 2).to(tl.int32)
    target = tl.load(states_ptr + place * 2 + 1)
    table = tl.load(tables_ptr + place * 32 + tl.arange(0, 32))
    if target == 0:  # of top-p it is known only now: the first threshold keeps all there is
        target = tl.ceil(top_p.to(tl.float64) * tl.max(table, axis=0).to(tl.float64)).to(tl.int64)
    reached = tl.sum((table >= target).to(tl.int32), axis=0)
    return low + ((reached - 1) << (25 - 5 * turn)), target


@jit(do_not_specialize=["num_chunks", "index", "num_all_passes"])
def measure_kernel(
    logits_ptr,  # [L, V]
    rows_ptr,  # [L]
    temperature_ptr,  # [N], as the next three
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    best_ptr,  # [L, chunks]
    tables_ptr,  # [L, passes, 32], what reaches each threshold; begins as 0
    states_ptr,  # [L, passes, 2], lower bound and target of the pass
    logits_stride,
    vocab_size,
    num_chunks,
    index,
    num_all_passes,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    UNROLLED: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_PASSES: tl.constexpr,
):
    """One pass of a search for a limit: what of a chunk reaches each of 32 thresholds."""
    slot = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(rows_ptr + slot)
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    peak = logit_of(best_of(best_ptr, slot, num_chunks, CHUNKS))
    is_first = index < NUM_PASSES  # of two searches
    is_ranked, is_nucleus = (top_k > 0) & (top_k < vocab_size), top_p < 1
    is_searched = (is_first & (is_ranked | is_nucleus)) | (is_ranked & is_nucleus)
    if (is_drawn(temperature, peak) & is_searched) == 0:
        return

    is_count = is_first & is_ranked
    turn = index % NUM_PASSES
    place = slot * num_all_passes + index
    low, target = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
    if index > 0:
        before = (index - 1) % NUM_PASSES
        low, target = narrowed(tables_ptr, states_ptr, place - 1, before, top_p)
    if turn == 0:
        low = tl.where(is_count, 0, tl.maximum(low, bits_of(min_p)))
        target = tl.where(is_count, top_k, 0).to(tl.int64)
    if chunk == 0:
        tl.store(states_ptr + place * 2, low.to(tl.int64))
        tl.store(states_ptr + place * 2 + 1, target)

    largest = logit_of(tl.load(best_ptr + slot * num_chunks + chunk))
    largest = tl.exp((largest - peak) * tl.div_rn(1.0, temperature))
    if largest < low.to(tl.float32, bitcast=True):
        return
    thresholds = low + (tl.arange(0, 32) << (25 - 5 * turn))
    thresholds = thresholds.to(tl.float32, bitcast=True)
    sums = tl.zeros((32, LANES), tl.float32)
    places = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for start in range(0, CHUNK, 8 * LANES * UNROLLED):
        for piece in tl.static_range(UNROLLED):  # so that their loads are under way together
            columns = chunk * CHUNK + start + piece * 8 * LANES + places
            weights = weights_of(
                logits_ptr + slot * logits_stride, columns, vocab_size, peak, temperature
            )
            # A thread has eight neighbours, which are one load, and takes them one by one.
            fours = tl.split(tl.reshape(weights, (LANES, 4, 2)))
            for i in tl.static_range(2):
                twos = tl.split(tl.reshape(fours[i], (LANES, 2, 2)))
                for j in tl.static_range(2):
                    ones = tl.split(twos[j])
                    for k in tl.static_range(2):
                        reaches = ones[k][None, :] >= thresholds[:, None]
                        sums += tl.where(reaches, tl.where(is_count, 1.0, ones[k])[None, :], 0.0)
    found = tl.sum(sums, axis=1) * tl.where(is_count, 1.0, SCALE)
    table = tables_ptr + place * 32 + tl.arange(0, 32)
    tl.atomic_add(table, found.to(tl.int64), sem="relaxed")

"""Rotary position embedding (Su et al. 2021), and the keys and values of a step into their pages.

With a head's halves a, b (the NeoX pairing: dimension i with i + D / 2) at position p:

    a' = a cos(p f) - b sin(p f)
    b' = b cos(p f) + a sin(p f)      angles, sines and products in fp32, rounded once

Query heads are rotated where they lie. Key heads are rotated and go to their slots, and so do the
value heads as they are. Pages of 8 bits have a scale for each vector (one head of one token):

    scale = max(|v|) / largest        127 for int8, 448 for float8_e4m3fn
    page  = v * (largest / max(|v|))  to the nearest number, ties to even

A vector of zeros, or of numbers no larger than 1e-30, has scale 0 and is stored as zeros.

qkv is [T, (H + 2 Hkv) * D], pages are [num_blocks, Hkv, block_size, D]. One program has one token
and up to `_NUMBERS` / D of its heads: it computes sines and cosines once for all of them, and a
thread reads 16 bytes at a time of each half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample

SMALLEST = 1e-30  # below it, largest / max(|v|) would overflow
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_NUMBERS = 2048  # of a program's tile
_NUM_WARPS = 2


@jit
def _store(low, high, pages_ptr, scale_ptr, place, scale_place, valid, HALF, LARGEST, SMALLEST):
    """Put the halves [heads, HALF] of vectors at the offsets `place` [heads], where `valid`."""
    column = tl.arange(0, low.shape[1])[None, :]
    valid = valid[:, None] & (column < HALF)
    kind = pages_ptr.dtype.element_ty
    if scale_ptr is not None:
        longest = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
        longest = tl.where(longest > SMALLEST, longest, 0.0)
        largest = tl.full(longest.shape, LARGEST, tl.float32)
        factor = tl.where(longest > 0.0, tl.div_rn(largest, longest), 0.0)[:, None]
        scale = tl.div_rn(longest, largest)
        tl.store(scale_ptr + scale_place, scale, mask=tl.max(valid, axis=1) > 0)
        low = low * factor
        high = high * factor
        if kind == tl.int8:  # 1.5 * 2^23 leaves no bit for a fraction: the sum is rounded to even
            low = (low + 12582912.0) - 12582912.0
            high = (high + 12582912.0) - 12582912.0
    place = pages_ptr + place[:, None] + column
    tl.store(place, low.to(kind), mask=valid)
    tl.store(place + HALF, high.to(kind), mask=valid)


@jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_store_kernel(
    qkv_ptr,  # [T, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]
    frequencies_ptr,  # [HALF]
    positions_ptr,  # [T]
    slots_ptr,  # [T]
    key_ptr,  # [num_blocks, NUM_KV_HEADS, block_size, 2 * HALF]
    value_ptr,
    key_scale_ptr,  # [num_blocks, NUM_KV_HEADS, block_size], or None
    value_scale_ptr,
    qkv_stride,
    block_stride,  # of the pages
    head_stride,
    scale_block_stride,
    scale_head_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_HEADS
    head = first + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = column < HALF
    valid = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside
    place = qkv_ptr + token.to(tl.int64) * qkv_stride + head[:, None] * (2 * HALF) + column
    low = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=valid, other=0.0).to(tl.float32)
    if first < NUM_HEADS + NUM_KV_HEADS:
        position = tl.load(positions_ptr + token).to(tl.float32)
        angle = position * tl.load(frequencies_ptr + column, mask=inside, other=0.0)
        turns = (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
        cosine = tl.where(turns, tl.cos(angle), 1.0)
        sine = tl.where(turns, tl.sin(angle), 0.0)
        low, high = low * cosine - high * sine, high * cosine + low * sine
    if first < NUM_HEADS:
        kind = qkv_ptr.dtype.element_ty
        is_query = valid & (head < NUM_HEADS)[:, None]
        tl.store(place, low.to(kind), mask=is_query)
        tl.store(place + HALF, high.to(kind), mask=is_query)
    if first + BLOCK_HEADS > NUM_HEADS:
        slot = tl.load(slots_ptr + token)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        pages = block * block_stride + offset * (2 * HALF)
        scales = block * scale_block_stride + offset
        key = head - NUM_HEADS
        is_key = (key >= 0) & (key < NUM_KV_HEADS)
        _store(
            low,
            high,
            key_ptr,
            key_scale_ptr,
            pages + key * head_stride,
            scales + key * scale_head_stride,
            is_key,
            HALF,
            LARGEST,
            SMALLEST,
        )
        value = key - NUM_KV_HEADS
        is_value = (value >= 0) & (value < NUM_KV_HEADS)
        _store(
            low,
            high,
            value_ptr,
            value_scale_ptr,
            pages + value * head_stride,
            scales + value * scale_head_stride,
            is_value,
            HALF,
            LARGEST,
            SMALLEST,
        )


class _Tile(NamedTuple):
    """What a program has: heads, and columns of each half."""

    BLOCK_HEADS: int
    BLOCK_HALF: int


def _tiling(num_heads: int, head_dim: int) -> _Tile:
    """The tile for that many heads of all kinds."""
    half = triton.next_power_of_2(head_dim // 2)
    heads = min(max(_NUMBERS // (2 * half), 1), triton.next_power_of_2(num_heads))
    return _Tile(heads, half)


def _rope_store(
    qkv: torch.Tensor,
    frequencies: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages_key: torch.Tensor,
    pages_value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Rotate the query heads of qkv in place; rotate the keys; store keys and values.

    The key and value heads in qkv stay as they were.

    Args:
        qkv: [T, (H + 2 Hkv) * D], query, key and value heads; its rows may be apart.
        frequencies: [D / 2] fp32, radians per position.
        positions: [T] int32.
        slots: [T] int64, block * block_size + offset of each token; all distinct, but for those of
            a dummy block, which hold what any of their tokens left there.
        pages_key, pages_value: [num_blocks, Hkv, block_size, D] of the same strides, the vectors of
            a head one after the other.
        key_scale, value_scale: [num_blocks, Hkv, block_size] fp32 with pages of 8 bits, else None.
    """
    assert qkv.stride(1) == 1, "a row lies in one piece"
    assert pages_key.stride() == pages_value.stride(), "one place for key and value"
    assert pages_key.stride()[2:] == (head_dim, 1), "a head's block lies in one piece"
    assert (key_scale is None) == (pages_key.dtype not in LARGEST), "scales belong to 8 bits"
    assert key_scale is None or value_scale is not None
    scale_strides = (0, 0) if key_scale is None else key_scale.stride()[:2]
    all_heads = num_heads + 2 * num_kv_heads
    tile = _tiling(all_heads, head_dim)
    _rope_store_kernel[(len(qkv), triton.cdiv(all_heads, tile.BLOCK_HEADS))](
        qkv,
        frequencies,
        positions,
        slots,
        pages_key,
        pages_value,
        key_scale,
        value_scale,
        qkv.stride(0),
        pages_key.stride(0),
        pages_key.stride(1),
        *scale_strides,
        BLOCK_SIZE=pages_key.shape[2],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        LARGEST=LARGEST.get(pages_key.dtype, 1.0),
        SMALLEST=SMALLEST,
        **tile._asdict(),
        num_warps=_NUM_WARPS,
    )


def reference(
    qkv: torch.Tensor,
    frequencies: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages_key: torch.Tensor,
    pages_value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """The same in torch."""
    heads = qkv.unflatten(1, (-1, head_dim))
    first_value = num_heads + num_kv_heads
    low, high = heads[:, :first_value].float().chunk(2, -1)
    angle = (positions.float()[:, None] * frequencies)[:, None]
    cosine, sine = angle.cos(), angle.sin()
    turned = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)
    heads[:, :num_heads] = turned[:, :num_heads].to(qkv.dtype)
    _put(turned[:, num_heads:], slots, pages_key, key_scale)
    _put(heads[:, first_value:].float(), slots, pages_value, value_scale)


def _put(
    vectors: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Store vectors [T, Hkv, D] in their slots."""
    block, offset = slots // pages.shape[2], slots % pages.shape[2]
    if scales is not None:
        largest = LARGEST[pages.dtype]
        longest = vectors.abs().amax(-1)
        longest = torch.where(longest > SMALLEST, longest, 0.0)
        factor = torch.where(longest > 0.0, largest / longest, 0.0)
        scales[block, :, offset] = longest / largest
        vectors = vectors * factor[..., None]
        if pages.dtype == torch.int8:
            vectors = vectors.round()
    # As bytes: torch has no scatter of 8-bit floats.
    stored = vectors.to(pages.dtype)
    if pages.itemsize == 1:
        stored, pages = stored.view(torch.int8), pages.view(torch.int8)
    pages[block, :, offset] = stored


def samples(device: torch.device) -> Iterator[Sample]:
    """Every kind of pages; odd shapes of heads, blocks and dimensions; none and one token.

    "far" is the end of a context of 131072, where angles are large.
    """
    generator = torch.Generator().manual_seed(4)
    bfloat16, float32 = torch.bfloat16, torch.float32
    # label, format, pages, T, H, Hkv, D, block size, tolerance
    cases = (
        ("decode", bfloat16, bfloat16, 3, 8, 2, 128, 16, 8e-3),
        ("fp16", torch.float16, torch.float16, 2, 4, 4, 64, 4, 1e-3),
        ("one query head", float32, float32, 5, 1, 1, 8, 1, 1e-5),
        ("a third of a power of two", bfloat16, bfloat16, 3, 7, 1, 80, 3, 8e-3),
        ("programs of one kind", float32, float32, 1, 32, 16, 96, 256, 1e-5),
        ("int8", bfloat16, torch.int8, 5, 6, 2, 80, 5, 8e-3),
        ("fp8", bfloat16, torch.float8_e4m3fn, 5, 14, 2, 64, 16, 8e-3),
        ("far", float32, float32, 2, 6, 2, 128, 1, 1e-5),
        ("no token", bfloat16, bfloat16, 0, 4, 2, 64, 16, 0.0),
    )
    for label, dtype, kind, num_tokens, num_heads, num_kv_heads, head_dim, block_size, tol in cases:
        num_blocks = num_tokens + 1
        width = (num_heads + 2 * num_kv_heads) * head_dim
        qkv = torch.randn((num_tokens, width + head_dim), generator=generator)[:, :width]
        qkv[-1:, -head_dim:] = 0.0
        place = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
        positions = torch.randint(0, 5000, (num_tokens,), generator=generator)
        if label == "far":
            positions = 131071 - torch.arange(num_tokens)
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        pages = [torch.zeros(shape, dtype=kind, device=device) for _ in range(2)]
        scales = [torch.full(shape[:3], 0.5, device=device) for _ in range(2)]
        args = (
            qkv.to(device, dtype),
            (10000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2))).to(device),
            positions.to(device, torch.int32),
            place.to(device),
            *pages,
            *(scales if kind in LARGEST else (None, None)),
        )
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        yield label, args, sizes, tol


rope_store = Op(_rope_store, reference, samples)


def compilations() -> Iterator[Compilation]:
    """What 8B models have, with each kind of pages; a head that is no power of 2."""
    for kind, head_dim, lowest in (("bf16", 128, 80), ("i8", 128, 80), ("fp8e4nv", 128, 90)):
        yield _compilation(kind, head_dim, lowest)
    yield _compilation("bf16", 80, 80)


def _compilation(kind: str, head_dim: int, lowest: int) -> Compilation:
    """32 query heads on 8 key heads."""
    signature = dict.fromkeys(("qkv_stride", "block_stride", "head_stride"), "i32:16")
    signature |= {"qkv_ptr": "*bf16:16", "frequencies_ptr": "*fp32:16"}
    signature |= {"positions_ptr": "*i32", "slots_ptr": "*i64"}
    signature |= {"key_ptr": f"*{kind}:16", "value_ptr": f"*{kind}:16"}
    sizes = {
        "BLOCK_SIZE": 16,
        "NUM_HEADS": 32,
        "NUM_KV_HEADS": 8,
        "HALF": head_dim // 2,
        "SMALLEST": SMALLEST,
    }
    constexprs: dict[str, float | None] = {**sizes, **_tiling(48, head_dim)._asdict()}
    scale_pointers = ("key_scale_ptr", "value_scale_ptr")
    scale_strides = ("scale_block_stride", "scale_head_stride")
    if kind == "bf16":
        constexprs |= dict.fromkeys(scale_pointers) | dict.fromkeys(scale_strides, 0)
    else:
        signature |= dict.fromkeys(scale_pointers, "*fp32:16")
        signature |= dict.fromkeys(scale_strides, "i32:16")
    constexprs["LARGEST"] = {"i8": 127.0, "fp8e4nv": 448.0}.get(kind, 1.0)
    label = f"rope_store {kind} {head_dim}"
    return Compilation(label, _rope_store_kernel, signature, constexprs, _NUM_WARPS, lowest=lowest)

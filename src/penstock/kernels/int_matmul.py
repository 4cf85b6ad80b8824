"""Products with matrices of 8-bit or 4-bit integers; activations keep their type.

    y[t, n] = row_scale[n] * sum over k of x[t, k] * w[n, k] + bias[n]
    w[n, k] = (q[n, k] - zero[g, n]) * scale[g, n],  g = k // group_size

w is rounded to the type of x, which is exact where scales are integers up to 15 (the two-level
scales of QServe, Lin et al. 2024): sums are float32. q is -128 to 127, or in 4 bits 0 to 15 with a
zero of 8 unless there are others (as AWQ and GPTQ store theirs).

Layout: x [T, K]; a matrix has its columns padded to C, a multiple of 128, and lies in int16 words
[N, C * bits / 16]. A run of 128 columns is 32 words of four nibbles or 64 words of two bytes:
nibble i of word j is column j + 32 i of the run, byte i is column j + 64 i. So 16 bytes hold
neighbouring columns of each of these parts, and two words in one register become two neighbouring
numbers by a shift and a bit operation: under the bits of 128.0, (word >> 4 i) & 15 is the bfloat16
number 128 + q (Kim et al. 2022, "Who says elephants can't run"; Marlin, Frantar et al. 2024). A
byte has one bit more than fits there: it is the difference of its low 7 bits and its sign, both
under the same bits. No thread needs what another one has loaded.

Tiling: a program computes y^T for BLOCK_N rows of the matrix and BLOCK_T tokens, in steps of
UNROLL runs of 128 columns. The matrix is the left operand of the tensor cores, because on Hopper
that one may come from registers, where it is unpacked, and because then a few tokens waste nothing:
they are the short side. With few tokens several programs share K (`split_k`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from penstock.kernels.chip import AMPERE, HOPPER, Chip, chip
from penstock.kernels.int_words import RUN, pack, weights_of
from penstock.kernels.jit import INTERPRETED, jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample
from penstock.kernels.split_k import added, cut, is_last, room, stages

FIRST_TOKENS = (1, 17, 33, 65, 513)  # numbers of tokens from which on tiles are others
_MANY_ROWS = 2048  # of a matrix: so many fill a GPU with the largest tiles, which share no sums
_MAGIC = {torch.bfloat16: (0x4300, 128), torch.float16: (0x6400, 1024), torch.float32: (0, 0)}


@jit
def _bits(
    words,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    MAGIC: tl.constexpr,
    UNPACK: tl.constexpr,
    T: tl.constexpr,
):
    """Bits of every word as a number of type T, the bits of MAGIC above them."""
    if UNPACK is not None:
        found = tl.inline_asm_elementwise(
            UNPACK[SHIFT // 4 if MASK == 15 else 4 + SHIFT // 4 + (MASK == 128)],
            "=r,r",
            [words],
            dtype=T.value,
            is_pure=True,
            pack=2,
        )
    elif MAGIC == 0:
        found = ((words >> SHIFT) & MASK).to(T)
    else:
        found = (((words >> SHIFT) & MASK) | MAGIC).to(T, bitcast=True)
    return found


@jit
def _weights(
    words,
    factors,
    scales,
    zeros,
    places,  # of scale and zero of each row
    T: tl.constexpr,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    UNPACK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Numbers of a part of a run, rounded to T; in the interpreter those as float32."""
    q = _bits(words, 15 if BITS == 4 else 127, PART * BITS, MAGIC, UNPACK, T)
    if INTERPRETED:  # its arithmetic of bfloat16 is not right
        q = q.to(tl.float32)
    if BITS == 8:
        q = q - _bits(words, 128, PART * BITS, MAGIC, UNPACK, T).to(q.dtype)
    if factors is not None:
        # One operation, and exact: so are all its operands, and 15 * (q - 8).
        factor = ((factors >> (8 * PART)) & 15).to(q.dtype)
        q = tl.fma(q, factor[:, None], (factor * -(8 + OFFSET))[:, None])
    else:
        if zeros is not None:
            q = q - (tl.load(zeros + places) + OFFSET).to(q.dtype)[:, None]
        elif BITS == 4:
            q = q - (8 + OFFSET)
        if scales is not None:
            q = (q * tl.load(scales + places).to(T).to(q.dtype)[:, None]).to(T).to(q.dtype)
    return q


@jit(do_not_specialize=["num_tokens", "num_runs", "runs_per_split"])
def _kernel(
    x,
    packed,
    factors,
    scales,
    zeros,
    row_scales,
    bias,
    out,
    partial,  # [splits, T, N] float32, if several programs share K
    counters,
    num_tokens,
    num_rows,
    num_columns,
    num_runs,
    x_stride,
    runs_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    UNPACK: tl.constexpr,
    EVEN: tl.constexpr,  # num_columns is a multiple of 128
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    T: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 8 * BITS  # columns of one product
    TOGETHER: tl.constexpr = 4 if BLOCK_T <= 32 else 1  # parts of a sum, as registers allow
    # Programs that run at the same time share rows of both matrices, which the cache then has once.
    num_token_tiles, num_row_tiles = tl.num_programs(0), tl.num_programs(1)
    row_tile, token_tile = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), num_row_tiles, num_token_tiles, 16
    )
    split = tl.program_id(2)
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, WIDTH)
    is_token = token < num_tokens
    # What lies behind the last row is computed from the last one, and not stored.
    safe_row = tl.minimum(row, num_rows - 1)
    x_tile = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    tile = packed + safe_row[:, None].to(tl.int64) * (num_runs * WIDTH) + column[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    first = split * runs_per_split
    last = tl.minimum(first + runs_per_split, num_runs)
    for start in tl.range(first, last, UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            run = start + step
            words = tl.load(tile + run * WIDTH)
            run_factors = None
            if factors is not None:
                run_factors = tl.load(factors + run * num_rows + safe_row)
            for part in tl.static_range(128 // WIDTH):
                at = run * 128 + part * WIDTH
                inside = is_token[None, :]
                if not EVEN:
                    inside = inside & (at + column < num_columns)[:, None]
                x_part = tl.load(x_tile + at, mask=inside, other=0.0)
                group = (run * 128) // GROUP if GROUP >= 128 else at // GROUP
                weights = _weights(
                    words,
                    run_factors,
                    scales,
                    zeros,
                    group * num_rows + safe_row,
                    T,
                    BITS,
                    part,
                    MAGIC,
                    OFFSET,
                    UNPACK,
                    INTERPRETED,
                )
                x_part = x_part.to(weights.dtype)
                total = tl.dot(weights, x_part, total, input_precision="ieee")
    total = tl.trans(total)
    place = token[:, None].to(tl.int64) * num_rows + row[None, :]
    mask = is_token[:, None] & (row[None, :] < num_rows)
    num_splits = tl.num_programs(2) if BLOCK_T <= 128 else 1
    if num_splits > 1:
        counter = counters + row_tile * num_token_tiles + token_tile
        size = num_tokens.to(tl.int64) * num_rows
        if not is_last(total, partial, counter, place, mask, size, split, num_splits):
            return
        total = added(partial, counter, place, mask, size, num_splits, TOGETHER)
    if row_scales is not None:
        total *= tl.load(row_scales + safe_row)[None, :]
    if bias is not None:
        total += tl.load(bias + safe_row).to(tl.float32)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def _int_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    row_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply x [T, K] with a matrix of integers: [T, N] in the type of x.

    Args:
        x: bfloat16, float16 or float32; rows at any distance, columns side by side.
        packed: int16 [N, C * bits / 16] (`pack`).
        scales: of groups. float32 [C / group_size, N], or uint8 [C / 128, N, 4]: a factor of 0 to
            15 for each of the four runs of 32 columns, of 4 bits without zeros. None: 1.
        zeros: float32 [C / group_size, N]: integers that q is taken less. None: 8 of 4 bits, or 0.
        bits: 8 or 4.
        group_size: 64, or a multiple of 128, or in 4 bits 32; 0: there are only scales of rows.
        row_scales: float32 [N], applied to the sums. None: 1.
        bias: [N], of any floating type.
    """
    num_tokens, num_columns = x.shape
    num_rows = len(packed)
    num_runs = packed.shape[1] // (8 * bits)
    _check(x, packed, scales, zeros, bits, group_size)
    out = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    is_factor = scales is not None and scales.dtype == torch.uint8
    num_tables = (scales is not None) + (zeros is not None)
    if not is_factor and 0 < group_size < RUN:
        num_tables *= RUN // group_size
    form = _shape(num_tokens, num_rows, num_runs, bits, num_tables, x.dtype, chip(x.device))
    tiles = triton.cdiv(num_tokens, form["BLOCK_T"]), triton.cdiv(num_rows, form["BLOCK_N"])
    waves = 128 // form["BLOCK_T"] if form["BLOCK_T"] >= 64 else 2
    splits, per_split = cut(tiles[0] * tiles[1], num_runs, form["UNROLL"], waves, x.device)
    _kernel[(*tiles, splits)](
        x,
        packed,
        scales.view(torch.int32) if scales is not None and is_factor else None,
        None if is_factor else scales,
        zeros,
        row_scales,
        bias,
        out,
        *room(splits, out),
        num_tokens,
        num_rows,
        num_columns,
        num_runs,
        x.stride(0),
        per_split,
        EVEN=num_columns == num_runs * RUN,
        **_constants(bits, group_size, x.dtype),
        **form,
    )
    return out


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    """What the kernel relies on."""
    assert bits in {4, 8}
    assert packed.dtype == torch.int16
    assert packed.is_contiguous()
    padded = packed.shape[1] * 16 // bits
    assert padded % RUN == 0
    assert padded - RUN < x.shape[1] <= padded
    assert x.stride(1) == 1
    assert group_size in {8 * bits, 64} or group_size % RUN == 0
    for table in (scales, zeros):
        assert table is None or table.is_contiguous()
    if scales is not None and scales.dtype == torch.uint8:
        assert bits == 4
        assert zeros is None


def _shape(
    num_tokens: int,
    num_rows: int,
    num_runs: int,
    bits: int,
    num_tables: int,
    dtype: torch.dtype,
    chip: Chip,
) -> dict[str, int]:
    """Tile sizes, and as many steps of loads under way as there is memory for.

    They change with the number of tokens only at those of `FIRST_TOKENS`.

    Args:
        num_tables: scales and zeros that there are of 4 bytes for a row and a run.
    """
    rows, tokens, wanted, warps = 64, 64, 4, 4
    if dtype == torch.float32:  # not on tensor cores
        rows, tokens, wanted = 32, 16, 3
    elif num_tokens <= 32:
        tokens = 16 if num_tokens <= 16 else 32
    elif num_tokens > 512 and num_rows >= _MANY_ROWS and chip.capability == 90:
        rows, tokens, wanted, warps = 128, 256, 3, 8
    elif num_tokens > 64:
        rows, tokens, warps = 128, 128, 8
    unroll = 2 if tokens <= 32 and num_runs % 2 == 0 else 1
    matrix_bytes = rows * (RUN * bits // 8 + 4 * num_tables) * unroll
    token_bytes = tokens * RUN * dtype.itemsize * unroll
    return {
        "BLOCK_N": rows,
        "BLOCK_T": tokens,
        "UNROLL": unroll,
        "STAGES": stages(wanted, matrix_bytes, token_bytes, chip),
        "num_warps": warps,
    }


def _constants(bits: int, group_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What is compiled into the kernel for a format."""
    magic, offset = _MAGIC[dtype]
    unpack = None
    if magic and not INTERPRETED:
        nibbles = [_instructions(shift, 15, magic) for shift in (0, 4, 8, 12)]
        low, high = ([_instructions(shift, m, magic) for m in (127, 128)] for shift in (0, 8))
        unpack = (*nibbles, *low, *high)
    return {
        "BITS": bits,
        "GROUP": group_size or RUN,
        "MAGIC": magic,
        "OFFSET": offset if bits == 4 else 0,
        "UNPACK": unpack,
        "INTERPRETED": INTERPRETED,
    }


def _instructions(shift: int, mask: int, magic: int) -> str:
    """((word >> shift) & mask) | magic of two words in a register, as PTX.

    Of what the shift moves from one word into the other, `mask` lets nothing through.
    """
    both, above = mask << 16 | mask, magic << 16 | magic
    and_or = 0xEA  # the truth table of (a & b) | c
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, {both}, {above}, {and_or}; }}"


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    row_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch."""
    weights = weights_of(packed, scales, zeros, bits, group_size, x.dtype)
    out = x.float() @ weights[:, : x.shape[1]].T
    if row_scales is not None:
        out *= row_scales
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def samples(device: torch.device) -> Iterator[Sample]:
    """Small arguments: K and N that fill no tile, every kind of scales."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    for label, dtype, bits, group, shape in (
        ("int8, scales of rows", torch.bfloat16, 8, 0, (3, 70, 200)),
        ("int8, groups, zeros", torch.float16, 8, 64, (2, 33, 256)),
        ("int8, float32", torch.float32, 8, 128, (2, 7, 128)),
        ("int4, groups of 32, zeros", torch.float16, 4, 32, (17, 65, 130)),
        ("int4, groups of 128", torch.bfloat16, 4, 128, (1, 40, 256)),
        ("int4, long and few", torch.bfloat16, 4, -32, (1, 5, 4300)),
        ("int8, long and few", torch.bfloat16, 8, 0, (2, 3, 4096)),
        ("int4, factors", torch.bfloat16, 4, -32, (5, 17, 256)),
        ("int4, factors, float32", torch.float32, 4, -32, (2, 3, 100)),
        ("int4, many tokens", torch.bfloat16, 4, -32, (66, 4, 128)),
    ):
        num_tokens, num_rows, num_columns = shape
        padded = -(-num_columns // RUN) * RUN
        x = drawn(num_tokens, num_columns + 8).to(dtype)[:, :num_columns]
        lowest = 0 if bits == 4 else -128
        packed = pack(integers(lowest, lowest + 2**bits, num_rows, padded), bits)
        scales = zeros = None
        if group < 0:
            scales = integers(0, 16, padded // RUN, num_rows, 4).to(torch.uint8)
        elif group > 0:
            scales = drawn(padded // group, num_rows) / 10
        if "zeros" in label:
            zeros = integers(0, 16, padded // group, num_rows).float()
        words = {"bits": bits, "group_size": abs(group)}
        vectors = {"row_scales": drawn(num_rows) / 9, "bias": drawn(num_rows).to(dtype)}
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        yield label, (x, packed, scales, zeros), words | vectors, tolerance


def compilations() -> Iterator[Compilation]:
    """What the kernel is compiled for: the formats of a checkpoint, few tokens and many."""
    numbers = {"num_tokens": "i32", "num_rows": "i32:16", "num_columns": "i32:16"}
    numbers |= {"num_runs": "i32", "x_stride": "i32:16", "runs_per_split": "i32"}
    for label, bits, group, table, num_tokens, target in (
        ("int8", 8, 0, None, 16, HOPPER),
        ("int8", 8, 0, None, 64, HOPPER),
        ("int8", 8, 0, None, 128, HOPPER),
        ("int8", 8, 0, None, 2048, HOPPER),
        ("int4 factors", 4, 32, "factors", 16, HOPPER),
        ("int4 factors", 4, 32, "factors", 32, HOPPER),
        ("int4 factors", 4, 32, "factors", 128, HOPPER),
        ("int4 factors", 4, 32, "factors", 2048, HOPPER),
        ("int4 groups of 128", 4, 128, "scales", 2048, HOPPER),
        ("int4 factors", 4, 32, "factors", 16, AMPERE),
        ("int8", 8, 0, None, 2048, AMPERE),
    ):
        form = _shape(num_tokens, 4096, 32, bits, table is not None, torch.bfloat16, target)
        warps = form.pop("num_warps")
        dtypes = {"x": "bf16", "packed": "i16", "row_scales": "fp32", "bias": "bf16"}
        dtypes |= {"out": "bf16", "partial": "fp32", "counters": "i32"}
        if table is not None:
            dtypes[table] = "i32" if table == "factors" else "fp32"
        signature = {name: f"*{dtype}:16" for name, dtype in dtypes.items()} | numbers
        absent = {"factors", "scales", "zeros"} - dtypes.keys()
        constexprs = dict.fromkeys(absent) | _constants(bits, group, torch.bfloat16) | form
        constexprs["EVEN"] = True
        yield Compilation(
            f"int_matmul {target.capability} {label}, {num_tokens} tokens",
            _kernel,
            signature,
            constexprs,
            warps,
            lowest=target.capability,
            wgmma=target == HOPPER,
        )


int_matmul = Op(_int_matmul, reference, samples)

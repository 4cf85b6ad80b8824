"""What the two paged-attention kernels share: a tile of queries against a run of pages.

A tile has M rows: query tokens times the G query heads of one KV head, side by side, so that keys
and values are loaded once for all of them (grouped-query attention packed into M). It walks over
the context in tiles of BLOCK_N tokens with the online softmax of FlashAttention-2 (Dao, 2023):

    s = q k^T * scale;  m' = max(m, rowmax s);  p = exp(s - m')
    l' = l exp(m - m') + rowsum p;  acc' = acc exp(m - m') + p v;  output acc / l at the end

all in base 2 (log2 e is part of the scale) and float32. 8-bit pages hold vectors divided by their
scales: scores are multiplied with those of the keys; values are multiplied with theirs before they
are rounded to the type of the queries, because a probability times a scale may be too small for
float16 where the probability and the value are not.

Several programs may share a context: `combined` puts together what they leave.

Pages are [block, KV head, token of the block, D]; "slot" here is an index into the first three, so
that it addresses vectors and scales alike. Past the context anything may lie there, infinities and
NaN of other requests too: entries of the block table are not read there, keys are loaded and their
scores discarded, values and their scales count as zeros, because NaN times a weight of 0 is NaN.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from penstock.kernels.jit import jit, tl
from penstock.kernels.op import Compilation

LOG2E = math.log2(math.e)
# Pointers to indices, read one at a time: their alignment need not make a kernel of its own.
INDICES = (
    "table_ptr",
    "rows_ptr",
    "query_start_ptr",
    "context_len_ptr",
    "work_ptr",
    "row_ids_ptr",
)


@jit
def blocks_of(table, start, limit, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Blocks of the tokens [start, start + BLOCK_N), one where they share it; 0 past the limit."""
    tokens = start if BLOCK_SIZE % BLOCK_N == 0 else start + tl.arange(0, BLOCK_N)
    return tl.load(table + tokens // BLOCK_SIZE, mask=tokens < limit, other=0)


@jit
def vectors(pages, slots, there, D: tl.constexpr, D_PADDED: tl.constexpr):
    """[BLOCK_N, D_PADDED] of the slots, with zeros behind D, and where not `there`, if given."""
    numbers = tl.arange(0, D_PADDED)
    pointers = pages + slots[:, None] * D + numbers[None, :]
    if there is not None:
        loaded = tl.load(pointers, mask=there[:, None] & (numbers < D)[None, :], other=0.0)
    elif D == D_PADDED:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=(numbers < D)[None, :], other=0.0)
    return loaded


@jit
def capped(scores, CAPPED: tl.constexpr):
    """tanh of half the scores (the factors around it are the caller's), or the scores."""
    if CAPPED:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores))
    return scores


@jit
def attend(
    accumulator,  # [M, D_PADDED] float32
    total,  # [M] float32: l above
    top,  # [M] float32: m above, base 2
    query,  # [M, D_PADDED]
    position,  # [M] the query's token, from the start of its context
    first,  # tokens [first, last) of the context, both multiples of BLOCK_N
    last,
    limit,  # context length
    keys,
    values,
    key_scale,
    value_scale,
    table,  # the row's blocks
    head,  # KV head
    inner_scale,  # on the raw scores, before the cap; unused without one
    outer_scale,  # on the (capped) scores, log2 e included; above 0
    MASKED: tl.constexpr,  # whether a query may not see all of the tokens
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """The state (accumulator, total, top) after the tokens [first, last) of the context."""
    # The blocks of a tile are loaded one tile ahead: the loads of keys and values then depend on
    # nothing that is loaded in the same round, and the compiler can pipeline them.
    blocks = blocks_of(table, first, limit, BLOCK_N, BLOCK_SIZE)
    for start in tl.range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        slots = (blocks.to(tl.int64) * NUM_KV_HEADS + head) * BLOCK_SIZE + columns % BLOCK_SIZE
        blocks = blocks_of(table, start + BLOCK_N, limit, BLOCK_N, BLOCK_SIZE)
        key = vectors(keys, slots, None, D, D_PADDED).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if SCALED:
            scores *= tl.load(key_scale + slots)[None, :]
        if CAPPED:
            scores = capped(scores * inner_scale, CAPPED)
        if MASKED:
            visible = columns[None, :] <= position[:, None]
            if WINDOW > 0:
                visible &= columns[None, :] > position[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * outer_scale)
        # A query that has seen nothing yet has no finite maximum to subtract.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        weights = tl.exp2(scores * outer_scale - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        there = columns < limit if MASKED else None
        value = vectors(values, slots, there, D, D_PADDED)
        if SCALED:
            factor = tl.load(value_scale + slots, mask=there, other=0.0 if MASKED else None)
            value = value.to(tl.float32) * factor[:, None]
        accumulator = tl.dot(
            weights.to(query.dtype),
            value.to(query.dtype),
            accumulator * decay[:, None],
            input_precision="ieee",
        )
    return accumulator, total, top


@jit
def combined(
    partial_ptr,  # vectors of D float32: outputs
    partial_log_ptr,  # and for each the logarithm of its denominator, base 2
    places,  # [ROWS] of the vectors of the first share
    stride,  # vectors from one share to the next
    shares,  # how many there are
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LOADED: tl.constexpr,  # shares that are loaded at once
):
    """Outputs [ROWS, D_PADDED] over all shares of a context, from those that programs have left.

    With the outputs o_s of shares and the logarithms l_s of their denominators it is
    sum o_s 2^(l_s - L) / sum 2^(l_s - L), L = max l_s (Flash-Decoding; Dao et al., 2023).
    """
    numbers = tl.arange(0, D_PADDED)
    accumulator = tl.zeros((ROWS, D_PADDED), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, shares, LOADED):
        share = start + tl.arange(0, LOADED)
        # A share that is not there repeats the last one, and weighs nothing.
        place = tl.minimum(share, shares - 1)[:, None] * stride + places[None, :]
        logs = tl.load(partial_log_ptr + place, cache_modifier=".cg")
        logs = tl.where((share < shares)[:, None], logs, float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing was seen so far
        weights = tl.exp2(logs - base[None, :])
        decay = tl.exp2(top - base)
        parts = tl.load(
            partial_ptr + (place * D)[:, :, None] + numbers[None, None, :],
            mask=(numbers < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        accumulator = accumulator * decay[:, None] + tl.sum(parts * weights[:, :, None], 0)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
    return accumulator / total[:, None]


class Tensors(NamedTuple):
    """The tensors that both operations take, in their order."""

    q: torch.Tensor  # [T, H, D]; may be strided but for the last dimension
    keys: torch.Tensor  # [blocks, Hkv, block_size, D], as the three below contiguous
    values: torch.Tensor
    key_scale: torch.Tensor | None  # [blocks, Hkv, block_size] float32; with 8-bit pages only
    value_scale: torch.Tensor | None
    sinks: torch.Tensor | None  # [H] float32
    block_table: torch.Tensor  # [N, M] int32
    rows: torch.Tensor  # [R] int32, rows of block_table
    query_start: torch.Tensor  # [R + 1] int32
    context_len: torch.Tensor  # [R] int32


def padded(head_dim: int) -> int:
    """D_PADDED of `attend`."""
    return max(16, 1 << (head_dim - 1).bit_length())


def sizes(group: int, num_kv_heads: int, block_size: int, head_dim: int) -> dict[str, int]:
    """Those constants of both kernels that the model and its pages give."""
    return {
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "D": head_dim,
        "D_PADDED": padded(head_dim),
    }


def factors(scale: float, soft_cap: float) -> tuple[float, float]:
    """`inner_scale` and `outer_scale` of `attend`."""
    if soft_cap:  # cap tanh(y) = cap (1 - 2 / (1 + exp 2y))
        return 2 * LOG2E * scale / soft_cap, soft_cap * LOG2E
    return 1.0, scale * LOG2E


def attend_row(t: Tensors, row: int, scale: float, window: int, soft_cap: float) -> torch.Tensor:
    """The oracle: attention of the queries of one row of the batch, [n, H, D], in float32.

    It reads the row's numbers on the host.
    """
    start, stop = t.query_start[row : row + 2].tolist()
    context, num_blocks = int(t.context_len[row]), -(-int(t.context_len[row]) // t.keys.shape[2])
    blocks = t.block_table[int(t.rows[row]), :num_blocks].long()
    keys = _gathered(t.keys, t.key_scale, blocks)[:, :context]
    values = _gathered(t.values, t.value_scale, blocks)[:, :context]
    num_queries, num_heads, head_dim = stop - start, t.q.shape[1], t.q.shape[2]
    # [Hkv, n, G, D]: the query heads of one KV head are a matrix.
    queries = t.q[start:stop].float().view(num_queries, len(keys), -1, head_dim).transpose(0, 1)
    scores = torch.einsum("kngd,ksd->kngs", queries, keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    columns = torch.arange(context, device=t.q.device)
    position = torch.arange(context - num_queries, context, device=t.q.device)[:, None]
    hidden = columns > position
    if window:
        hidden |= columns <= position - window
    scores.masked_fill_(hidden[:, None], -math.inf)
    if t.sinks is not None:
        sinks = t.sinks.float().view(len(keys), 1, -1, 1).expand(-1, num_queries, -1, -1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1)[..., :context]
    out = torch.einsum("kngs,ksd->kngd", weights, values)
    return out.transpose(0, 1).reshape(num_queries, num_heads, head_dim)


def attend_rows(
    t: Tensors, rows: list[int], out: torch.Tensor, scale: float, window: int, soft_cap: float
) -> None:
    """`attend_row` of some rows of the batch into out [T, H, D]."""
    starts = t.query_start.tolist()
    for row in rows:
        out[starts[row] : starts[row + 1]] = attend_row(t, row, scale, window, soft_cap)


def _gathered(
    pages: torch.Tensor, scale: torch.Tensor | None, blocks: torch.Tensor
) -> torch.Tensor:
    """The vectors of some blocks in float32, [Hkv, len(blocks) * block_size, D]."""
    if pages.itemsize == 1:  # not every device indexes float8
        found = pages.view(torch.uint8)[blocks].view(pages.dtype).float()
    else:
        found = pages[blocks].float()
    if scale is not None:
        found *= scale[blocks][..., None]
    return found.transpose(0, 1).flatten(1, 2)


def arguments(
    kernel: Any, dtype: str, pages: str, group: int, block_size: int, head_dim: int
) -> dict[str, Any]:
    """What to compile a kernel with: the type of each argument, or the value of a constant.

    8 KV heads, no feature; the caller changes what differs and adds the tiling.
    """
    scales = None if pages == dtype else "*fp32:16"
    known = {
        **dict.fromkeys(("q_ptr", "out_ptr"), dtype),
        **dict.fromkeys(("keys_ptr", "values_ptr"), pages),
        **dict.fromkeys(("key_scale_ptr", "value_scale_ptr"), scales),
        **dict.fromkeys(("partial_ptr", "partial_log_ptr"), "*fp32:16"),
        "counters_ptr": "*i32:16",
        **dict.fromkeys(INDICES, "*i32"),
        **dict.fromkeys(("q_stride_token", "q_stride_head", "table_stride"), "i32:16"),
        **dict.fromkeys(("inner_scale", "outer_scale"), "fp32"),
        **dict.fromkeys(("fill", "min_tiles", "long_tiles"), "i32"),
        **sizes(group, 8, block_size, head_dim),
        "sinks_ptr": None,
        "WINDOW": 0,
        "CAPPED": False,
    }
    return {name: value for name, value in known.items() if name in kernel.arg_names}


def compilation(
    label: str, kernel: Any, arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> Compilation:
    """The arguments divided into types and constants. Older chips than Hopper have no fp8."""
    signature = {name: kind for name, kind in arguments.items() if isinstance(kind, str)}
    constants = {name: value for name, value in arguments.items() if name not in signature}
    lowest = 90 if "fp8" in str(signature) else 80
    return Compilation(label, kernel, signature, constants, num_warps, num_stages, lowest)


class Case(NamedTuple):
    """A batch to try the kernels with."""

    label: str
    lengths: tuple[int, ...]  # query tokens of each row
    contexts: tuple[int, ...]  # with them
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32  # of queries and, if they are not of 8 bits, of pages
    pages: torch.dtype | None = None
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False

    @property
    def tolerance(self) -> float:
        """Relative: what the format of the queries allows."""
        return {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[self.dtype]

    def options(self) -> dict[str, float]:
        """Keyword arguments of both operations."""
        scale = self.head_dim**-0.5
        return {"scale": scale, "window": self.window, "soft_cap": self.soft_cap}


def case_tensors(case: Case, device: torch.device) -> Tensors:
    """Random tensors of a case. Blocks and rows are shuffled; queries have gaps between tokens.

    What is not to be read of the block table is out of bounds. Where no token is, in blocks of the
    rows and in block 0, which is nobody's, keys and their scales are NaN, values and theirs
    infinite.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, case.label)))
    blocks_of = [-(-context // case.block_size) for context in case.contexts]
    num_blocks, num_rows = sum(blocks_of) + 1, len(case.lengths)
    shape = (num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
    keys, values = torch.randn((2, *shape), generator=generator)
    scales: list[torch.Tensor | None] = [None, None]
    if case.pages is not None:
        largest = 127.0 if case.pages == torch.int8 else 448.0
        scales = [pages.abs().amax(-1) / largest for pages in (keys, values)]
        keys, values = (
            (pages / scale[..., None]).round() if largest == 127.0 else pages / scale[..., None]
            for pages, scale in zip((keys, values), scales, strict=True)
            if scale is not None
        )
    table = torch.full((num_rows + 2, max(blocks_of) + 3), 2**30, dtype=torch.int32)
    rows = torch.randperm(num_rows + 2, generator=generator)[:num_rows]
    shuffled = (torch.randperm(num_blocks - 1, generator=generator) + 1).split(blocks_of)
    is_free = torch.ones((num_blocks, case.block_size), dtype=torch.bool)
    for row, blocks, context in zip(rows, shuffled, case.contexts, strict=True):
        table[row, : len(blocks)] = blocks
        is_free[blocks] = torch.arange(is_free[blocks].numel()).view(-1, case.block_size) >= context
    for numbers, free in zip((keys, values), (torch.nan, torch.inf), strict=True):
        if case.pages != torch.int8:
            numbers.masked_fill_(is_free[:, None, :, None], free)
    for scale, free in zip(scales, (torch.nan, torch.inf), strict=True):
        if scale is not None:
            scale.masked_fill_(is_free[:, None], free)
    starts = torch.tensor([0, *case.lengths]).cumsum(0)
    q = torch.randn((sum(case.lengths), case.num_heads + 1, case.head_dim), generator=generator)
    sinks = torch.randn(case.num_heads, generator=generator) if case.has_sinks else None
    kind = case.pages or case.dtype
    return Tensors(
        q.to(device, case.dtype)[:, : case.num_heads],
        keys.to(device, kind),
        values.to(device, kind),
        None if scales[0] is None else scales[0].to(device),
        None if scales[1] is None else scales[1].to(device),
        None if sinks is None else sinks.to(device),
        table.to(device),
        rows.int().to(device),
        starts.int().to(device),
        torch.tensor(case.contexts, dtype=torch.int32, device=device),
    )

"""From the slices of a step to what the model reads for each of its tokens.

Slice r computes positions starts[r], starts[r] + 1, ... of row rows[r], and its tokens are
query_start[r] .. query_start[r + 1] of the step. For token t of slice r:

    positions[t] = starts[r] + t - query_start[r]
    input_ids[t] = token_ids[rows[r], positions[t]]
    slots[t] = block_table[rows[r], positions[t] // block_size] * block_size
               + positions[t] % block_size

One thread has one token, and finds its slice by binary search. Nothing goes to the host: a step can
be started while the tokens that it reads are still being sampled. Numbers that change from step to
step are no reason to compile again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample

_BLOCK = 128


_POINTERS = (  # read and written one number a thread: their alignment makes no other kernel
    "rows_ptr",
    "starts_ptr",
    "query_start_ptr",
    "token_ids_ptr",
    "block_table_ptr",
    "input_ids_ptr",
    "positions_ptr",
    "slots_ptr",
)


@jit(do_not_specialize=["num_slices", "num_tokens"], do_not_specialize_on_alignment=_POINTERS)
def _step_inputs_kernel(
    rows_ptr,  # [R]
    starts_ptr,  # [R]
    query_start_ptr,  # [R + 1]
    token_ids_ptr,  # [N, L]
    block_table_ptr,  # [N, M]
    input_ids_ptr,  # [T]
    positions_ptr,  # [T]
    slots_ptr,  # [T]
    num_slices,
    num_tokens,
    token_ids_stride,
    block_table_stride,
    block_size,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < num_tokens
    low = tl.zeros((BLOCK,), tl.int32)  # query_start[low] <= token < query_start[high]
    high = tl.zeros((BLOCK,), tl.int32) + num_slices
    width = num_slices
    while width > 1:
        middle = (low + high) // 2
        begun = tl.load(query_start_ptr + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
        width = (width + 1) // 2
    row = tl.load(rows_ptr + low).to(tl.int64)
    position = tl.load(starts_ptr + low) + token - tl.load(query_start_ptr + low)
    input_id = tl.load(token_ids_ptr + row * token_ids_stride + position, mask=valid, other=0)
    block = tl.load(
        block_table_ptr + row * block_table_stride + position // block_size, mask=valid, other=0
    )
    slot = block.to(tl.int64) * block_size + position % block_size
    tl.store(positions_ptr + token, position, mask=valid)
    tl.store(input_ids_ptr + token, input_id, mask=valid)
    tl.store(slots_ptr + token, slot, mask=valid)


def _step_inputs(
    rows: torch.Tensor,
    starts: torch.Tensor,
    query_start: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Fill `input_ids` and `positions`, int32, and `slots`, int64, each [T].

    Args:
        rows: [R] int32, at least one, into `token_ids` and `block_table`.
        starts: [R] int32, the first position of each slice.
        query_start: [R + 1] int32, the sum of the lengths before each slice; the last is >= T.
        token_ids: [N, L] int32, the tokens of each row by position.
        block_table: [N, M] int32, the blocks of each row.
    """
    num_tokens = len(input_ids)
    assert len(rows) > 0, "a step has a slice"
    assert token_ids.stride(1) == block_table.stride(1) == 1, "a row lies in one piece"
    _step_inputs_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
        rows,
        starts,
        query_start,
        token_ids,
        block_table,
        input_ids,
        positions,
        slots,
        len(rows),
        num_tokens,
        token_ids.stride(0),
        block_table.stride(0),
        block_size,
        BLOCK=_BLOCK,
        num_warps=_BLOCK // 32,
    )


def reference(
    rows: torch.Tensor,
    starts: torch.Tensor,
    query_start: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """The same in torch."""
    token = torch.arange(len(input_ids), dtype=torch.int32, device=input_ids.device)
    piece = torch.searchsorted(query_start[1:], token, right=True)
    row = rows[piece].long()
    torch.add(starts[piece], token - query_start[piece], out=positions)
    place = positions.long()
    input_ids.copy_(token_ids[row, place])
    slots.copy_(block_table[row, place // block_size].long() * block_size + place % block_size)


def samples(device: torch.device) -> Iterator[Sample]:
    """Decode, ragged and single slices, an empty one between others, more than a program's."""
    generator = torch.Generator().manual_seed(3)

    def integers(high: int, *shape: int) -> torch.Tensor:
        """Numbers below `high`."""
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(device)

    cases = {
        "decode": ([1] * 7, 16),
        "one token": ([1], 1),
        "ragged": ([3, 1, 0, 150, 1, 1, 9], 5),
        "one prompt": ([131], 16),
    }
    for label, (lengths, block_size) in cases.items():
        num_rows = len(lengths) + 2
        query_start = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        outputs = [
            torch.full((sum(lengths),), -1, dtype=dtype, device=device)
            for dtype in (torch.int32, torch.int32, torch.int64)
        ]
        args = (
            torch.randperm(num_rows, generator=generator)[: len(lengths)].to(device, torch.int32),
            integers(40, len(lengths)),
            query_start,
            integers(1000, num_rows, 200),
            integers(2**30, num_rows, -(-200 // block_size)),
            block_size,
            *outputs,
        )
        yield label, args, {}, 0.0


step_inputs = Op(_step_inputs, reference, samples)


def compilations() -> Iterator[Compilation]:
    """The one kernel."""
    signature = dict.fromkeys(_POINTERS, "*i32") | {"slots_ptr": "*i64"}
    signature |= dict.fromkeys(("num_slices", "num_tokens"), "i32")
    signature |= dict.fromkeys(("token_ids_stride", "block_table_stride", "block_size"), "i32:16")
    yield Compilation("step_inputs", _step_inputs_kernel, signature, {"BLOCK": _BLOCK}, 4)

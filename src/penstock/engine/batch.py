"""From a plan to the arrays of one step: gathers what the model reads out of the device state.

Common to every model and every step, so it is hot: a constant number of array operations,
whatever the number of rows. Owns nothing; knows rows and slices, no requests.
Invariant: token t of the batch belongs to the row whose query_start interval holds t, and slices
keep the order of the plan.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.engine.plan import Slice
from penstock.engine.state import DeviceState
from penstock.models.batch import ForwardBatch


class StepBatch(NamedTuple):
    """What the model reads, and which rows the runner samples afterwards."""

    forward: ForwardBatch
    rows: NDArray[np.int64]  # [R] the row of each slice
    sampled_rows: NDArray[np.int64]  # [L] the row of each of forward.logit_rows


def build_batch(slices: list[Slice], state: DeviceState) -> StepBatch:
    """The batch that computes `slices` (at least one), whose rows have the blocks they need.

    A slice that reaches the last token of its row gets a logit row.
    """
    num_slices = len(slices)
    flat = np.fromiter(chain.from_iterable(slices), np.int64, 3 * num_slices)
    rows, starts, lengths = np.ascontiguousarray(flat.reshape(num_slices, 3).T)
    ends = starts + lengths
    query_start = np.zeros(num_slices + 1, np.int32)
    np.cumsum(lengths, out=query_start[1:])
    num_tokens = int(query_start[-1])

    if num_tokens == num_slices:  # a pure decode step: every slice is one token
        token_rows, positions = rows, starts
    else:
        token_rows = np.repeat(rows, lengths)  # [T]
        positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], lengths)
    block_size = state.block_size
    blocks, offsets = np.divmod(positions, block_size)
    slots = state.block_table[token_rows, blocks] * np.int64(block_size) + offsets
    width = -(-int(ends.max()) // block_size)

    sampled = ends == state.num_tokens[rows]
    batch = ForwardBatch(
        input_ids=state.token_ids[token_rows, positions],
        positions=positions,
        query_start=query_start,
        context_len=ends.astype(np.int32),
        slot_mapping=slots,
        block_table=state.block_table[rows, :width],
        block_size=block_size,
        logit_rows=query_start[1:][sampled].astype(np.int64) - 1,
        lengths=lengths.tolist(),
        context_lens=ends.tolist(),
    )
    return StepBatch(batch, rows, rows[sampled])

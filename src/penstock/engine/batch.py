"""From a plan to the arrays of one step: gathers what the model reads out of the device state.

Common to every model and every step, so it is hot: a constant number of array operations,
whatever the number of rows. Each costs, because the model leaves nothing of Python's in the caches:
rows that decode on keep their batch, which moves on by a token. Knows rows, and no requests.
Invariant: token t of the batch belongs to the row whose query_start interval holds t, and slices
keep the order of the plan. A batch that moved on equals one that is built anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from penstock.engine.plan import Slice, StepPlan
from penstock.engine.state import DeviceState
from penstock.models.batch import ForwardBatch

_NUM_AHEAD = 256  # tokens a row may decode before its part of the block table is too short


@dataclass(slots=True)
class StepBatch:
    """What the model reads, and which rows the runner samples afterwards."""

    forward: ForwardBatch
    rows: NDArray[np.int64]  # [R] the row of each slice
    sampled_rows: NDArray[np.int64]  # [L] the row of each of forward.logit_rows
    plain: bool  # whether all of these are, see `DeviceState.plain`
    counters: NDArray[np.int64]  # [3, T] positions, slots, places in the state's token ids
    num_ahead: int  # for how many more steps it can `advance`
    following: list[tuple[int, int, int]]  # the slices it advances to: one more token for each row

    def advance(self, state: DeviceState) -> None:
        """Become the batch of the slices `following`, whose rows have got their tokens."""
        self.counters += 1
        state.token_ids.take(self.counters[2], out=self.forward.input_ids, mode="clip")
        self.forward.advance(state.block_table, self.rows)
        self.following = [(row, start + 1, 1) for row, start, _ in self.following]
        self.num_ahead -= 1


def next_batch(last: StepBatch | None, plan: StepPlan, state: DeviceState) -> StepBatch:
    """The batch of a plan with slices that the state has followed.

    Args:
        last: that of the step before, if all its sampled rows got a token. It may be used up.
    """
    is_new = plan.admitted or plan.released  # the same row may be another request's
    if last is None or is_new or last.num_ahead == 0 or plan.slices != last.following:
        return build_batch(plan.slices, state)
    last.advance(state)
    return last


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
    counters = np.stack((positions, slots, token_rows * state.max_model_len + positions))
    sampled = ends == state.num_tokens[rows]
    decodes_on = num_tokens == num_slices and bool(sampled.all())
    longest = int(ends.max())
    width = -(-(longest + _NUM_AHEAD * decodes_on) // block_size)
    table = state.block_table[rows, :width]
    batch = ForwardBatch(
        input_ids=state.token_ids[token_rows, positions],
        positions=counters[0],
        query_start=query_start,
        context_len=ends.astype(np.int32),
        slot_mapping=counters[1],
        block_table=table,
        block_size=block_size,
        logit_rows=query_start[1:][sampled].astype(np.int64) - 1,
        lengths=lengths.tolist(),
        context_lens=ends.tolist(),
    )
    return StepBatch(
        batch,
        rows,
        rows[sampled],
        bool(state.plain[rows[sampled]].all()),
        counters,
        table.shape[1] * block_size - longest if decodes_on else 0,
        [(row, start + length, 1) for row, start, length in slices],
    )

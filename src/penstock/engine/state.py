"""What the device knows of every running request: permanent rows of arrays.

A request keeps its row from admission to release; steps gather from rows, they never move them.
Owns block tables by row, beside what `SamplingRows` owns; knows no request and no scheduling:
it follows the `StepPlan`s, so that every rank that applies the same plans holds the same state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.engine.plan import StepPlan
from penstock.sampling.rows import SamplingRows


class DeviceState(SamplingRows):
    """Rows for `max_num_seqs` requests of up to `max_model_len` tokens each.

    Every array's first dimension is the row. Readers may gather from all of them; only `apply`
    and `append` write.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        super().__init__(max_num_seqs, max_model_len)
        self.block_size = block_size
        max_num_blocks = -(-max_model_len // block_size)
        self.block_table: NDArray[np.int32] = np.zeros((max_num_seqs, max_num_blocks), np.int32)
        self.num_blocks: NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)

    @staticmethod
    def bytes_for(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
        """About what the arrays will take, without making them."""
        return max_num_seqs * (max_model_len * 8 + -(-max_model_len // block_size) * 4 + 64)

    def apply(self, plan: StepPlan) -> None:
        """Follow the plan: rows given up, rows taken, blocks appended, in this order."""
        for row in plan.released:
            self.release(row)
            self.num_blocks[row] = 0
        for row, token_ids, num_prompt, params, seed in plan.admitted:
            self.admit(row, token_ids, num_prompt, params, seed)
        for row, block_ids in plan.new_blocks:
            start = self.num_blocks[row]
            self.block_table[row, start : start + len(block_ids)] = block_ids
            self.num_blocks[row] = start + len(block_ids)

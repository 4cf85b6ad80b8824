"""The batch that one step computes: everything a model may read, in numpy arrays.

Owns `ForwardBatch`. Knows no requests: a row of a batch is a run of tokens with a context, and
nothing says whether it is a prompt, a chunk of one or a single generated token. Imports no torch.

Invariant: the batch is passed explicitly to everything; there is no global context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class ForwardBatch:
    """One step for the model: T tokens in R rows, of which L are asked for their logits.

    Row r holds the tokens [query_start[r], query_start[r + 1]) of the flat arrays. They are the
    last `lengths[r]` of the `context_lens[r]` tokens that its last query may see; the earlier ones
    are in the KV store already. Token i of a request lives in slot
    `block_table[r, i // block_size] * block_size + i % block_size`.

    The same object given again has the same arrays, whose contents may have changed.
    """

    input_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T] index of the token in its request
    query_start: NDArray[np.int32]  # [R + 1]
    context_len: NDArray[np.int32]  # [R] the tokens of this step included
    slot_mapping: NDArray[np.int64]  # [T] where the token's key and value are written; distinct
    block_table: NDArray[np.int32]  # [R, M], perhaps strided; entries past a context are not read
    block_size: int  # tokens in a block
    logit_rows: NDArray[np.int64]  # [L] indices into T, increasing
    # What the runner knows in Python anyway, so that planning need not read arrays back.
    lengths: list[int]  # [R] query tokens of the row, at least 1
    context_lens: list[int]  # [R] same as context_len

    def advance(self, block_table: NDArray[np.int32], rows: NDArray[np.int64]) -> None:
        """Let rows of one token each go on to the next, in place.

        `input_ids`, and the counting on of `positions` and `slot_mapping`, are the caller's.

        Args:
            block_table: [N, M], as long as it needs to be now.
            rows: [R] the rows in it that are those of the batch.
        """
        self.context_len += 1
        for index, position in enumerate(self.context_lens):
            if position % self.block_size == 0:  # the first of a block
                place = position // self.block_size
                block = int(block_table[rows[index], place])
                self.block_table[index, place] = block
                self.slot_mapping[index] = block * self.block_size
        self.context_lens = [position + 1 for position in self.context_lens]

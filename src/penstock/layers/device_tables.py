"""What a device holds of every row: its token ids and its blocks, at addresses that stay.

Owns these two tables and the numbers of the step in front of them. Knows neither requests nor
models: a runner says what changed. Rows are permanent, and steps name them; one row more than
requests have, `dummy_row`, is there for padding.

Invariant: every entry of the block table names a block, the dummy one where nothing was put, so
that whatever a kernel reads there is an address in the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from penstock.attention.paged import DeviceBatch
from penstock.kernels import transfer
from penstock.kernels.step_inputs import step_inputs


class DeviceTables:
    """Tables for `num_rows` requests of up to `max_model_len` tokens each, in one allocation.

    Args:
        dummy_block: the block that belongs to nobody (`KVPages.dummy_block`).
        device: where they are.
    """

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        dummy_block: int,
        device: torch.device,
    ) -> None:
        self.num_rows = num_rows
        self.dummy_row = num_rows
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        max_num_blocks = -(-max_model_len // block_size)
        num_ids, num_blocks = (num_rows + 1) * max_model_len, (num_rows + 1) * max_num_blocks
        (_, self._first_block), num_numbers = transfer.places([num_ids, num_blocks])
        self._numbers = torch.zeros(num_numbers, dtype=torch.int32, device=device)
        self.token_ids = self._numbers[:num_ids].view(num_rows + 1, max_model_len)
        of_blocks = self._numbers[self._first_block : self._first_block + num_blocks]
        self.block_table = of_blocks.view(num_rows + 1, max_num_blocks)
        self.block_table.fill_(dummy_block)
        # A decode step: three numbers a row, two for the place of its token, three for a new block.
        self._inputs = torch.zeros(
            8 * (num_rows + transfer.ALIGNMENT), dtype=torch.int32, device=device
        )

    @property
    def num_bytes(self) -> int:
        """What they take on the device."""
        return self._numbers.nbytes + self._inputs.nbytes

    def place(self, row: int, position: int) -> int:
        """The place of a token id, for `write`."""
        return row * self.max_model_len + position

    def block_place(self, row: int, index: int) -> int:
        """The place of an entry of the block table, for `write`."""
        return self._first_block + row * self.block_table.shape[1] + index

    def write(self, places: torch.Tensor, numbers: torch.Tensor) -> None:
        """Put numbers [n] int32 into places [n] int64, both on the device; no place twice."""
        self._numbers.index_copy_(0, places, numbers)

    def fill(self, batch: DeviceBatch, starts: torch.Tensor) -> None:
        """Write what every token of a batch is: ids, positions and slots.

        Args:
            starts: [R] int32, the position of the first token of each row.
        """
        step_inputs(
            batch.rows,
            starts,
            batch.query_start,
            self.token_ids,
            self.block_table,
            self.block_size,
            batch.input_ids,
            batch.positions,
            batch.slots,
        )

    def inputs(self, size: int) -> list[torch.Tensor]:
        """Where `upload` leaves the first three arrays of `size` numbers each, if it can."""
        starts, _ = transfer.places([size] * 3)
        return [self._inputs[start : start + size] for start in starts]

    def upload(self, arrays: Sequence[NDArray[Any]], *, is_fixed: bool) -> list[torch.Tensor]:
        """Copy the numbers of a step to the device, in one go.

        Args:
            is_fixed: to the same address in every step; what was there is overwritten in turn.
        """
        return transfer.upload(arrays, self.device, self._inputs if is_fixed else None)

    def fits(self, arrays: Sequence[NDArray[Any]]) -> bool:
        """Whether there is room for these at a fixed address."""
        _, num_numbers = transfer.places([array.nbytes // 4 for array in arrays])
        return num_numbers <= len(self._inputs)

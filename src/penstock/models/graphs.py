"""Decode steps as CUDA graphs: one launch in place of hundreds.

Owns for how many rows there is a graph, and the tensors that they read and write at fixed
addresses. A step of fewer rows is filled up with the dummy row, whose token goes to the dummy page.
On a CPU a replay calls the same function over the same tensors, so that padding and what earlier
steps left behind are tested without a GPU. Knows no requests.

Invariant: a replay gives what an eager step of these rows would give, whatever was in the tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.attention.paged import DeviceBatch
from penstock.kernels.jit import INTERPRETED
from penstock.kernels.op import mode
from penstock.layers.device_tables import DeviceTables
from penstock.models.device_footprint import graph_sizes
from penstock.models.device_model import DeviceModel

I32 = NDArray[np.int32]


class DecodeGraphs:
    """Steps of one token a row, captured when this is made, over the rows of `tables`."""

    def __init__(self, model: DeviceModel, tables: DeviceTables) -> None:
        self.sizes = graph_sizes(tables.num_rows)
        self._model = model
        self._tables = tables
        most, device = self.sizes[-1], model.device
        self._input_ids = torch.zeros(most, dtype=torch.int32, device=device)
        self._positions = torch.zeros(most, dtype=torch.int32, device=device)
        self._slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._query_start = torch.arange(most + 1, dtype=torch.int32, device=device)
        # Of all sizes, because one pool of memory serves all graphs: what a graph made for itself
        # is gone when the next one is replayed.
        self._logits = torch.zeros(most, model.spec.vocab_size, dtype=model.dtype, device=device)
        self._pool: Any = None  # memory of the largest graph, which is captured first
        self._steps: dict[int, tuple[DeviceBatch, Callable[[], object]]] = {}
        for size in reversed(self.sizes):
            self._steps[size] = self._capture(size)

    def padded(self, rows: I32, starts: I32) -> list[I32]:
        """A step of rows [R] that each compute the token at `starts` [R], for `replay`.

        Returns:
            Rows, starts and contexts, filled up: the first arrays of what `tables.upload` puts to
            its fixed address.
        """
        num_rows = len(rows)
        numbers = np.empty((3, self._size_for(num_rows)), np.int32)
        numbers[0, :num_rows], numbers[0, num_rows:] = rows, self._tables.dummy_row
        numbers[1, :num_rows], numbers[1, num_rows:] = starts, 0
        np.add(numbers[1], 1, out=numbers[2])
        return list(numbers)

    def replay(self, padded: list[I32]) -> torch.Tensor:
        """Compute the step whose `padded` numbers were uploaded.

        Returns:
            Logits of all its rows, [>= R, V], valid until the next replay.
        """
        size = len(padded[0])
        batch, run = self._steps[size]
        batch.contexts = padded[2].tolist()
        self._model.attention.refresh(batch, batch.meta)
        run()
        return self._logits[:size]

    def _size_for(self, num_rows: int) -> int:
        return self.sizes[bisect_left(self.sizes, num_rows)]

    @torch.inference_mode()
    def _capture(self, size: int) -> tuple[DeviceBatch, Callable[[], object]]:
        """The step of so many rows, and what repeats it."""
        model, tables = self._model, self._tables
        dummies = np.full(size, tables.dummy_row, np.int32)
        tables.upload(self.padded(dummies, np.zeros_like(dummies)), is_fixed=True)
        rows, starts, context_len = tables.inputs(size)
        batch = DeviceBatch(
            input_ids=self._input_ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            rows=rows,
            query_start=self._query_start[: size + 1],
            context_len=context_len,
            block_table=tables.block_table,
            logit_rows=self._query_start[:size].long(),
            lengths=[1] * size,
            max_context_len=tables.max_model_len,
            kv=model.kv,
            attention=model.attention,
            contexts=[1] * size,
        )
        batch.meta = model.attention.capture(batch)
        compute = partial(self._compute, batch, starts)
        if model.device.type != "cuda" or mode() != "triton" or INTERPRETED:
            return batch, compute  # references ask the device what to do, which no graph can hold
        compute()  # compiles kernels, and lets libraries set themselves up
        graph = torch.cuda.CUDAGraph()
        # Threads of other libraries (NCCL's watchdog) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        self._pool = self._pool or graph.pool()
        return batch, graph.replay

    def _compute(self, batch: DeviceBatch, starts: torch.Tensor) -> None:
        """What is captured: all from the numbers of the step to the logits."""
        self._tables.fill(batch, starts)
        hidden = self._model.decoder.forward(batch)
        self._logits[: len(batch.rows)].copy_(self._model.logits(hidden))

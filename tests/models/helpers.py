"""Models for tests, and batches for them: a request is a row with blocks of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.models.base import Model
from penstock.models.batch import ForwardBatch
from penstock.models.load import load_model
from penstock.native import library

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        library.unavailable_reason() is not None, reason="no native library here"
    ),
)
BACKENDS = ["torch", NATIVE]
NUM_BLOCKS = 512
MAX_TOKENS = 256
MAX_BLOCK_SIZE = 48  # sessions of any block size that divides it share the slots of a model


def load(path: Path, dtype: str = "float32", *, backend: str = "torch", **options: Any) -> Model:
    """The model of a directory, with slots for a `Sessions`."""
    return load_model(
        path,
        backend=backend,
        dtype=dtype,
        num_slots=NUM_BLOCKS * MAX_BLOCK_SIZE,
        max_num_tokens=MAX_TOKENS,
        max_num_logit_rows=MAX_TOKENS,
        **options,
    )


class Sessions:
    """Token rows over a model's KV store; blocks are handed out in a scattered order."""

    def __init__(self, model: Model, *, block_size: int) -> None:
        assert MAX_BLOCK_SIZE % block_size == 0
        self.model = model
        self.block_size = block_size
        self.free = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}

    def batch(self, work: dict[str, list[int]]) -> ForwardBatch:
        """A batch that computes the next tokens of each named row."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, contexts = [0], []
        for name, tokens in work.items():
            blocks = self.blocks.setdefault(name, [])
            first = self.computed.get(name, 0)
            context = first + len(tokens)
            while len(blocks) * self.block_size < context:
                blocks.append(self.free.pop())
            for position in range(first, context):
                block = blocks[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            ids += tokens
            positions += range(first, context)
            starts.append(len(ids))
            contexts.append(context)
            self.computed[name] = context
        width = max(len(self.blocks[name]) for name in work) + 1
        # Entries past a row's blocks must not be read: a poisoned id would raise.
        table = [self.blocks[n] + [2**30] * (width - len(self.blocks[n])) for n in work]
        return ForwardBatch(
            input_ids=np.array(ids, np.int64),
            positions=np.array(positions, np.int64),
            query_start=np.array(starts, np.int32),
            context_len=np.array(contexts, np.int32),
            slot_mapping=np.array(slots, np.int64),
            block_table=np.array(table, np.int32),
            block_size=self.block_size,
            logit_rows=np.array(starts[1:], np.int64) - 1,
            lengths=[len(tokens) for tokens in work.values()],
            context_lens=contexts,
        )

    def step(self, work: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Compute the next tokens of each named row; logits of all of them, [length, V]."""
        batch = self.batch(work)
        self.model.forward(batch)
        logits = torch.from_numpy(self.model.logits(np.arange(len(batch.input_ids))).copy())
        return dict(zip(work, torch.split(logits, batch.lengths), strict=True))

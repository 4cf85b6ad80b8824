"""Batches for models in tests: a request is a row with blocks of its own."""

from __future__ import annotations

import torch

from penstock.attention.base import AttentionBackend, ForwardBatch
from penstock.attention.kv_store import KVStore
from penstock.attention.reference import ReferenceAttention
from penstock.models.blocks import Decoder


class Sessions:
    """Token rows over one KV store; blocks are handed out in a scattered order."""

    def __init__(
        self,
        model: Decoder,
        *,
        block_size: int,
        num_blocks: int = 512,
        attention: AttentionBackend | None = None,
    ) -> None:
        spec = model.spec
        self.model = model
        self.block_size = block_size
        self.attention = attention or ReferenceAttention()
        self.kv = KVStore(
            spec.num_layers,
            num_blocks * block_size,
            spec.num_kv_heads,
            spec.head_dim,
            model.embedding.weight.dtype,
        )
        generator = torch.Generator().manual_seed(num_blocks)
        self.free = torch.randperm(num_blocks, generator=generator).tolist()
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
        batch = ForwardBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_len=torch.tensor(contexts, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor(table, dtype=torch.int32),
            block_size=self.block_size,
            logit_rows=torch.tensor(starts[1:]) - 1,
            kv=self.kv,
            attention=self.attention,
            lengths=[len(tokens) for tokens in work.values()],
            context_lens=contexts,
        )
        batch.meta = self.attention.plan(batch)
        return batch

    def step(self, work: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Compute the next tokens of each named row; logits of all of them, [length, V]."""
        batch = self.batch(work)
        logits = self.model.logits(self.model.forward(batch))
        return dict(zip(work, torch.split(logits, batch.lengths), strict=True))

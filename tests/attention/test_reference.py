"""The reference backend against attention written out, over random ragged batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.attention import reference
from penstock.attention.base import AttentionLayer, TorchBatch
from penstock.attention.kv_store import KVStore
from penstock.attention.reference import ReferenceAttention


def make_batch(
    rows: list[tuple[int, int]],  # (query length, context length)
    kv: KVStore,
    block_size: int,
    attention: ReferenceAttention,
    generator: torch.Generator,
) -> TorchBatch:
    """Rows over scattered blocks; table entries past a row's context are not valid ids."""
    counts = [-(-context // block_size) for _, context in rows]
    ids = torch.randperm(kv.num_slots // block_size, generator=generator).tolist()
    table = torch.full((len(rows), max(counts) + 2), 2**30, dtype=torch.int32)
    slots: list[int] = []
    positions: list[int] = []
    for row, (length, context) in enumerate(rows):
        blocks = [ids.pop() for _ in range(counts[row])]
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(context - length, context):
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
    lengths = [length for length, _ in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    batch = TorchBatch(
        input_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.tensor(positions),
        query_start=starts.int(),
        context_len=torch.tensor([context for _, context in rows], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        block_table=table,
        block_size=block_size,
        kv=kv,
        attention=attention,
        lengths=lengths,
        context_lens=[context for _, context in rows],
    )
    batch.meta = attention.plan(batch)
    return batch


def expected(q: torch.Tensor, batch: TorchBatch, layer: AttentionLayer) -> torch.Tensor:
    """Attention by its definition, query by query, in fp64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    token, size = 0, batch.block_size
    for row, length in enumerate(batch.lengths):
        table = batch.block_table[row].tolist()
        for position in range(batch.context_lens[row] - length, batch.context_lens[row]):
            slots = [table[i // size] * size + i % size for i in range(position + 1)]
            keys = batch.kv.key(layer.kv_index)[slots].double()  # [S, Hkv, D]
            values = batch.kv.value(layer.kv_index)[slots].double()
            group = q.shape[1] // keys.shape[1]
            for head in range(q.shape[1]):
                scores = keys[:, head // group] @ q[token, head].double() * layer.scale
                out[token, head] = torch.softmax(scores, 0) @ values[:, head // group]
            token += 1
    return out


rows_strategy = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 30)).map(lambda pair: (pair[0], sum(pair))),
    min_size=1,
    max_size=6,
) | st.lists(st.integers(1, 40).map(lambda context: (1, context)), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(
    rows=rows_strategy,
    block_size=st.sampled_from([1, 3, 16]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    small_groups=st.booleans(),
    seed=st.integers(0, 100),
)
def test_it_is_attention(
    rows: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    small_groups: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), head_dim = heads, 8
    attention = ReferenceAttention()
    kv = KVStore(2, 400 * block_size, 2 * num_kv_heads, head_dim, torch.float32)
    kv.data.normal_(generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if small_groups:
            patch.setattr(reference, "GROUP_BYTES", 40 * 2 * num_kv_heads * head_dim * 4)
            patch.setattr(reference, "PIECE_LEN", 4)
        batch = make_batch(rows, kv, block_size, attention, generator)
        layer = AttentionLayer(1, 0.3)
        num_tokens = sum(batch.lengths)
        qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
        q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], 1)  # strided views
        before = kv.data[0].clone()
        out = attention.forward(q, k, v, layer, batch)
    assert torch.equal(kv.data[0], before)  # another layer's memory
    assert torch.equal(kv.key(1)[batch.slot_mapping], k)
    assert torch.equal(kv.value(1)[batch.slot_mapping], v)
    torch.testing.assert_close(out.double(), expected(q, batch, layer), rtol=1e-5, atol=1e-5)


def test_groups_and_pieces_are_made() -> None:
    """The grid above means little if everything fits into one group or piece."""
    attention = ReferenceAttention()
    kv = KVStore(1, 4096, 2, 8, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "GROUP_BYTES", 40 * 2 * 8 * 4)
        patch.setattr(reference, "PIECE_LEN", 4)
        rows = [(1, 3), (1, 39), (9, 20), (1, 100), (1, 4), (1, 12)]
        plan = make_batch(rows, kv, 1, attention, generator).meta
    sizes = [(group.num_rows, group.keys.shape[2]) for group in plan.groups]
    assert sizes == [(1, 100), (1, 39), (3, 12)]  # longest first, padded to the longest
    assert [(piece.start, piece.stop) for piece in plan.runs[0].pieces] == [
        (2, 6),
        (6, 10),
        (10, 11),
    ]


def test_bfloat16() -> None:
    attention = ReferenceAttention()
    kv = KVStore(1, 480, 4, 16, torch.bfloat16)
    kv.data.normal_()
    batch = make_batch([(1, 30), (7, 50), (1, 3)], kv, 16, attention, torch.Generator())
    q, k, v = torch.split(torch.randn(9, 8, 16).bfloat16(), [4, 2, 2], 1)
    out = attention.forward(q, k, v, AttentionLayer(0, 0.25), batch)
    assert out.dtype == torch.bfloat16
    reference_out = expected(q, batch, AttentionLayer(0, 0.25))
    torch.testing.assert_close(out.double(), reference_out, rtol=0, atol=0.04)


def test_one_instance_serves_growing_contexts_and_other_formats() -> None:
    attention = ReferenceAttention()
    layer = AttentionLayer(0, 0.5)
    generator = torch.Generator().manual_seed(1)
    for dtype, context in [
        (torch.float32, 5),
        (torch.float32, 600),
        (torch.bfloat16, 601),
        (torch.float32, 7),
    ]:
        kv = KVStore(1, 4096, 2, 8, dtype)
        kv.data.normal_(generator=generator)
        batch = make_batch([(1, context), (3, context)], kv, 16, attention, generator)
        qkv = torch.randn(4, 4, 8, generator=generator).to(dtype)
        q, k, v = torch.split(qkv, [2, 1, 1], 1)
        out = attention.forward(q, k, v, layer, batch)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            out.double(), expected(q, batch, layer), rtol=tolerance, atol=tolerance
        )


def test_unsupported_gives_reasons() -> None:
    attention = ReferenceAttention()
    good = SimpleNamespace(num_heads=6, num_kv_heads=2, head_dim=8)
    bad = SimpleNamespace(num_heads=6, num_kv_heads=4, head_dim=8)
    assert attention.unsupported(good, torch.bfloat16) == []
    (reason,) = attention.unsupported(good, torch.float16)
    assert "float16" in reason
    assert len(attention.unsupported(bad, torch.int8)) == 2


def test_kv_store_is_one_allocation_of_the_planned_size() -> None:
    kv = KVStore(3, 50, 4, 8, torch.bfloat16)
    num_bytes = kv.data.numel() * kv.data.element_size()
    assert num_bytes == 50 * 3 * 2 * 2 * 8 * 2
    assert not kv.data.any()
    k, v = torch.randn(2, 2, 8).bfloat16(), torch.randn(2, 2, 8).bfloat16()
    kv.write(1, k, v, torch.tensor([49, 7]))
    assert torch.equal(kv.key(1)[[49, 7]], k)
    assert torch.equal(kv.value(1)[[49, 7]], v)
    assert kv.data.count_nonzero() == k.count_nonzero() + v.count_nonzero()
    assert kv.key(1).data_ptr() == kv.data[1].data_ptr()

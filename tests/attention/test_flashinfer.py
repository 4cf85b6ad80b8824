"""What FlashInfer is told, by a stand-in that computes attention from exactly that."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from penstock.attention import flashinfer as ours
from penstock.attention.flashinfer import FlashInferAttention
from penstock.attention.paged import DeviceBatch, PagedLayer
from penstock.attention.pages import KVPages
from penstock.errors import EngineError
from penstock.kernels import paged
from penstock.kernels.paged import Case, Tensors, case_tensors

CPU = torch.device("cpu")
CASE = Case("pages", (1, 3, 2), (9, 3, 17), head_dim=64, block_size=4, dtype=torch.bfloat16)


class Shape:
    """As many heads as a `Case` has."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 64) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim


class Wrapper:
    """Attention over the pages that it was told to read; the arguments as FlashInfer names them."""

    made: ClassVar[list[Wrapper]] = []

    def __init__(self, workspace: torch.Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8
        assert not workspace.any()
        self.options, self.plans = options, 0
        Wrapper.made.append(self)

    def take(
        self,
        qo_indptr: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        sizes: tuple[int, ...],
        *,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert {x.dtype for x in (qo_indptr, indptr, indices, last_page_len)} == {torch.int32}
        self.sizes = sizes  # query heads, KV heads, head size, page size
        assert len(indptr) == len(qo_indptr) == len(last_page_len) + 1
        assert q_data_type == kv_data_type == torch.bfloat16
        self.plans += 1
        if self.options.get("use_cuda_graph"):
            kept = self.options["paged_kv_indices_buffer"]
            kept[: len(indices)] = indices
            assert len(self.options["paged_kv_indptr_buffer"]) == len(indptr)
            assert len(self.options["paged_kv_last_page_len_buffer"]) == len(last_page_len)
            indices = kept
        self.arrays = qo_indptr, indptr, indices, last_page_len
        self.layer = (sm_scale, window_left + 1, logits_soft_cap)

    def run(self, q: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert q.is_contiguous()
        assert (*q.shape[1:], *pages[0].shape[1:3]) == tuple(self.sizes[i] for i in (0, 2, 1, 3))
        qo_indptr, indptr, indices, last_page_len = self.arrays
        out = []
        for row in range(len(last_page_len)):
            blocks = indices[indptr[row] : indptr[row + 1]]
            context = (len(blocks) - 1) * pages[0].shape[2] + last_page_len[row]
            t = Tensors(
                q, *pages, None, None, None,
                blocks[None], torch.zeros(1), qo_indptr[row : row + 2], context[None],
            )  # fmt: skip
            out.append(paged.attend_row(t, 0, *self.layer))
        return torch.cat(out).to(q.dtype)


class Prefill(Wrapper):
    """`BatchPrefillWithPagedKVCacheWrapper`."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        *sizes: int,
        causal: bool = False,
        **options: Any,
    ) -> None:
        assert causal
        arrays = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.take(*arrays, sizes, **options)


class Decode(Wrapper):
    """`BatchDecodeWithPagedKVCacheWrapper`."""

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        *sizes: int,
        **options: Any,
    ) -> None:
        one_each = torch.arange(len(indptr), dtype=torch.int32)
        self.take(one_each, indptr, indices, last_page_len, sizes, **options)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """FlashInfer, as far as it is used."""
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill  # type: ignore[attr-defined]
    module.BatchDecodeWithPagedKVCacheWrapper = Decode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(Wrapper, "made", [])
    monkeypatch.setattr(ours, "WORKSPACE_BYTES", 64)
    return module


def batch_of(case: Case, *, told: bool = True) -> tuple[Tensors, DeviceBatch]:
    t = case_tensors(case, CPU)
    kv = KVPages(1, len(t.keys) - 1, case.block_size, case.num_kv_heads, case.head_dim, "bfloat16")
    kv.key(0)[:], kv.value(0)[:] = t.keys, t.values
    num_tokens = sum(case.lengths)
    batch = DeviceBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int32),
        positions=torch.zeros(num_tokens, dtype=torch.int32),
        slots=torch.zeros(num_tokens, dtype=torch.int64),
        rows=t.rows,
        query_start=t.query_start,
        context_len=t.context_len,
        block_table=t.block_table,
        logit_rows=torch.zeros(0, dtype=torch.int64),
        lengths=list(case.lengths),
        max_context_len=20,
        kv=kv,
        attention=FlashInferAttention(Shape(case.num_heads, case.num_kv_heads)),
        contexts=list(case.contexts) if told else None,
    )
    return t, batch


def check(t: Tensors, batch: DeviceBatch, layer: PagedLayer) -> None:
    options = (layer.scale, layer.window, layer.soft_cap)
    rows = [paged.attend_row(t, row, *options) for row in range(len(t.rows))]
    out = batch.attention.forward(t.q, layer, batch)
    torch.testing.assert_close(out, torch.cat(rows).to(t.q.dtype))


LAYERS = [PagedLayer(0, 0.125), PagedLayer(0, 0.2, window=5, soft_cap=3.0)]


@pytest.mark.parametrize("told", [True, False], ids=["contexts of the host", "of the device"])
@pytest.mark.parametrize("lengths", [(1, 3, 2), (1, 1, 1)], ids=["mixed", "decode"])
def test_rows_read_their_pages(package: ModuleType, lengths: tuple[int, ...], told: bool) -> None:
    case = CASE._replace(lengths=lengths)
    t, batch = batch_of(case, told=told)
    for _ in range(2):
        batch.meta = batch.attention.plan(batch)
        for layer in [*LAYERS, *LAYERS]:
            check(t, batch, layer)
    assert [type(made) for made in Wrapper.made] == [Decode if max(lengths) == 1 else Prefill] * 2
    assert [made.plans for made in Wrapper.made] == [2, 2], "once a step for each kind of layer"
    _, indptr, indices, last_page_len = Wrapper.made[0].arrays
    assert indptr.tolist() == [0, 3, 4, 9]
    assert last_page_len.tolist() == [1, 3, 1]
    table = [t.block_table[row, :n].tolist() for row, n in zip(t.rows, (3, 1, 5), strict=True)]
    assert indices.tolist() == [block for blocks in table for block in blocks]


def test_captured_batches_plan_again_before_each_replay(package: ModuleType) -> None:
    t, batch = batch_of(CASE._replace(lengths=(1, 1, 1)))
    batch.meta = batch.attention.capture(batch)
    for layer in LAYERS:
        check(t, batch, layer)
    batch.context_len.copy_(torch.tensor([2, 1, 16]))
    batch.contexts = [2, 1, 16]
    batch.attention.refresh(batch, batch.meta)
    for layer in LAYERS:
        check(t, batch, layer)
    assert [made.plans for made in Wrapper.made] == [2, 2]
    buffers = [made.options["paged_kv_indices_buffer"] for made in Wrapper.made]
    assert {len(buffer) for buffer in buffers} == {3 * 5}, "room for 20 tokens a row"
    assert all(made.options["use_cuda_graph"] for made in Wrapper.made)
    assert not any(made.options["use_tensor_cores"] for made in Wrapper.made)


def test_many_heads_of_a_group_decode_on_tensor_cores(package: ModuleType) -> None:
    case = CASE._replace(lengths=(1, 1, 1), num_heads=4, num_kv_heads=1)
    t, batch = batch_of(case)
    batch.meta = batch.attention.plan(batch)
    check(t, batch, LAYERS[0])
    assert Wrapper.made[0].options == {"use_tensor_cores": True}


def test_layers_that_it_cannot_compute(package: ModuleType) -> None:
    t, batch = batch_of(CASE)
    batch.meta = batch.attention.plan(batch)
    with pytest.raises(EngineError, match="attention sinks"):
        batch.attention.forward(t.q, PagedLayer(0, 1.0, sinks=torch.zeros(4)), batch)
    with pytest.raises(EngineError, match="pages of another format"):
        batch.attention.forward(t.q.float(), PagedLayer(0, 1.0), batch)


def test_reasons(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, gpu = FlashInferAttention(Shape()), torch.device("cuda")
    assert attention.unsupported(Shape(), "bfloat16", 5, gpu) == []
    assert attention.unsupported(Shape(), "bfloat16", 16, CPU) == [
        "it computes on NVIDIA GPUs only"
    ]
    for shape, dtype, reason in (
        (Shape(), "int8", "it knows no scale for each vector, which pages of `int8` have"),
        (Shape(), "float32", "must be `bfloat16` or `float16`, not `float32`"),
        (Shape(head_dim=80), "float16", "a size of `64`, `128`, `256`, not `80`"),
        (Shape(3), "float16", "`3` query heads cannot share `2` KV heads"),
    ):
        (told,) = attention.unsupported(shape, dtype, 16, gpu)
        assert reason in told
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.setattr(ours, "PACKAGE", "flashinfer_is_not_here")
    (told,) = attention.unsupported(Shape(), "float16", 16, gpu)
    assert told == "the Python package `flashinfer_is_not_here` is not installed"

"""Attention by FlashInfer (Ye et al., 2025), where that package is installed.

Owns its wrappers: one for each kind of layer (scale, window, soft cap) and phase, because those are
settled when a wrapper plans; and, for CUDA graphs, one for each captured batch as well, 8 MiB each.
Batches of one token a row go to its decode wrapper, all others, mixed ones too, to its prefill
wrapper. Pages are handed over as they are: layout HND.

Written against the source of FlashInfer 0.6.18 (`decode.py`, `prefill.py`); the methods and names
that are used have been the same since 0.2. It has been tested with a stand-in only, not with the
package itself.

Invariant: a plan is made from numbers of the host, `DeviceBatch.contexts`. Where the batch does not
have them, planning reads `context_len`, and waits for the device. A wrapper's plan goes through
host memory of its own, so the next one waits until the copy from there is done; as long as one step
at most is under way, it is.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.attention.base import AttentionShape
from penstock.attention.paged import DeviceBatch, PagedLayer, head_problems
from penstock.attention.pages import PAGE_DTYPES, SCALED
from penstock.errors import EngineError
from penstock.kernels import transfer

PACKAGE = "flashinfer"
HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 << 20  # what its documentation recommends; zeros, one for all wrappers
TENSOR_CORE_GROUP = 4  # query heads of a KV head from which on tensor cores decode faster


class _Kind(NamedTuple):
    """What a wrapper plans for."""

    scale: float
    window: int
    soft_cap: float


class _Pages(NamedTuple):
    """Which pages the rows read, in the form of compressed sparse rows."""

    indptr: torch.Tensor  # [R + 1] int32, on the host
    last_page_len: torch.Tensor  # [R] int32, on the host: tokens of the last page, at least 1
    indices: torch.Tensor  # [indptr[R]] int32, on the device


class _Wrapper(NamedTuple):
    """One of FlashInfer's, and when its last plan has been copied."""

    api: Any
    copied: transfer.Event


@dataclass(slots=True)
class _Plan:
    """Wrappers plan when the first layer of their kind comes."""

    query_start: torch.Tensor | None  # [R + 1] int32, on the host; None: one token a row
    pages: _Pages
    buffers: _Pages | None = None  # of a CUDA graph: at fixed addresses, all on the device
    planned: dict[_Kind, _Wrapper] = field(default_factory=dict)


class FlashInferAttention:
    """Implements `PagedAttention`."""

    name = "flashinfer"

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._eager: dict[tuple[bool, _Kind], _Wrapper] = {}  # by whether it is for decode

    def unsupported(
        self, shape: AttentionShape, kv_dtype: str, block_size: int, device: torch.device
    ) -> list[str]:
        """Why FlashInfer cannot serve such a model there; empty if it can."""
        reasons = []
        if find_spec(PACKAGE) is None:
            reasons.append(f"the Python package `{PACKAGE}` is not installed")
        if device.type != "cuda":
            reasons.append("it computes on NVIDIA GPUs only")
        reasons += head_problems(shape)
        if kv_dtype in SCALED:
            reasons.append(f"it knows no scale for each vector, which pages of `{kv_dtype}` have")
        elif kv_dtype not in ("bfloat16", "float16"):
            reasons.append(f"the KV format must be `bfloat16` or `float16`, not `{kv_dtype}`")
        if shape.head_dim not in HEAD_DIMS:
            sizes = ", ".join(f"`{size}`" for size in HEAD_DIMS)
            reasons.append(f"heads must have a size of {sizes}, not `{shape.head_dim}`")
        return reasons

    def plan(self, batch: DeviceBatch) -> _Plan:
        """List the pages of the rows."""
        query_start = None
        if max(batch.lengths, default=1) > 1:
            query_start = _host(np.cumsum([0, *batch.lengths]), batch)
        return _Plan(query_start, _pages(batch))

    def forward(self, q: torch.Tensor, layer: PagedLayer, batch: DeviceBatch) -> torch.Tensor:
        """See `PagedAttention.forward`.

        Raises:
            EngineError: the layer has sinks, or pages of another format than its queries.
        """
        plan: _Plan = batch.meta
        if layer.sinks is not None or q.dtype != PAGE_DTYPES[batch.kv.dtype]:
            what = "attention sinks" if layer.sinks is not None else "pages of another format"
            raise EngineError(
                f"FlashInfer has no {what} for this model.", hint="Choose the `triton` attention."
            )
        kind = _Kind(layer.scale, layer.window, layer.soft_cap)
        if kind not in plan.planned:
            plan.planned[kind] = self._wrapper(kind, plan, q.device)
            self._let_plan(plan.planned[kind], kind, plan, batch)
        pages = (batch.kv.key(layer.kv_index), batch.kv.value(layer.kv_index))
        out: torch.Tensor = plan.planned[kind].api.run(q.contiguous(), pages)
        return out

    def capture(self, batch: DeviceBatch) -> _Plan:
        """Buffers as long as contexts may become. Compute the batch once before the capture."""
        num_rows, device = len(batch.lengths), batch.input_ids.device
        most = num_rows * -(-batch.max_context_len // batch.kv.block_size)
        sizes = (num_rows + 1, num_rows, most)
        buffers = _Pages(*(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes))
        return _Plan(None, _pages(batch), buffers)

    def refresh(self, batch: DeviceBatch, meta: _Plan) -> None:
        """Plan again, with today's contexts."""
        meta.pages = _pages(batch)
        for kind, wrapper in meta.planned.items():
            self._let_plan(wrapper, kind, meta, batch)

    def _wrapper(self, kind: _Kind, plan: _Plan, device: torch.device) -> _Wrapper:
        key = (plan.query_start is None, kind)
        if plan.buffers is None and key in self._eager:
            return self._eager[key]
        if self._workspace.device != device or not len(self._workspace):
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        flashinfer = importlib.import_module(PACKAGE)
        group = self._shape.num_heads // self._shape.num_kv_heads
        if plan.query_start is not None:
            made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        else:
            fixed = {}
            if plan.buffers is not None:
                fixed = {
                    "use_cuda_graph": True,
                    "paged_kv_indptr_buffer": plan.buffers.indptr,
                    "paged_kv_indices_buffer": plan.buffers.indices,
                    "paged_kv_last_page_len_buffer": plan.buffers.last_page_len,
                }
            made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "HND", use_tensor_cores=group >= TENSOR_CORE_GROUP, **fixed
            )
        wrapper = _Wrapper(made, transfer.event(device))
        if plan.buffers is None:
            self._eager[key] = wrapper
        return wrapper

    def _let_plan(self, wrapper: _Wrapper, kind: _Kind, plan: _Plan, batch: DeviceBatch) -> None:
        shape, pages, dtype = self._shape, plan.pages, PAGE_DTYPES[batch.kv.dtype]
        where = (pages.indptr, pages.indices, pages.last_page_len)
        sizes = (shape.num_heads, batch.kv.num_kv_heads, shape.head_dim, batch.kv.block_size)
        options: dict[str, Any] = {
            "sm_scale": kind.scale,
            # Theirs counts the tokens before the query's own, and -1 is none.
            "window_left": kind.window - 1,
            "logits_soft_cap": kind.soft_cap,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }
        wrapper.copied.synchronize()
        if plan.query_start is None:
            wrapper.api.plan(*where, *sizes, **options)
        else:
            wrapper.api.plan(plan.query_start, *where, *sizes, causal=True, **options)
        wrapper.copied.record()


def _pages(batch: DeviceBatch) -> _Pages:
    """The pages of all rows. Their indices are put together on the device."""
    block_size, device = batch.kv.block_size, batch.input_ids.device
    known = batch.context_len.tolist() if batch.contexts is None else batch.contexts
    contexts = np.array(known, np.int64)
    counts = -(-contexts // block_size)
    indptr = np.cumsum([0, *counts])
    total = int(indptr[-1])
    counts_there = (batch.context_len + block_size - 1) // block_size
    first = counts_there.cumsum(0) - counts_there
    rows = torch.repeat_interleave(batch.rows.long(), counts_there, output_size=total)
    column = torch.arange(total, device=device)
    column -= torch.repeat_interleave(first, counts_there, output_size=total)
    return _Pages(
        _host(indptr, batch),
        _host(contexts - (counts - 1) * block_size, batch),
        batch.block_table[rows, column],
    )


def _host(numbers: NDArray[np.int64], batch: DeviceBatch) -> torch.Tensor:
    """Numbers in host memory that a copy to the batch's device may run from."""
    made = torch.from_numpy(numbers.astype(np.int32))
    return made.pin_memory() if batch.input_ids.is_cuda else made

"""What `kernels.py` times: operations on random inputs of a model's shapes, with their costs.

Owns the inputs and the counting of bytes and operations. A case makes its inputs when it is asked
for its calls, and keeps none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.device import Call
from penstock.attention.paged import DeviceBatch, PagedLayer, choose
from penstock.attention.pages import KVPages
from penstock.kernels.add_rms_norm import add_rms_norm
from penstock.kernels.gated import gated
from penstock.kernels.rope_store import rope_store
from penstock.kernels.sample import sample
from penstock.models.device_shapes import Share
from penstock.models.shapes import shapes_of
from penstock.models.spec import ModelSpec
from penstock.quantization.device import make_weight
from penstock.quantization.schemes import Format, device_bytes, scheme

DTYPE = torch.bfloat16
ITEM = 2  # its bytes
BLOCK_SIZE = 16
# Name -> temperature, top-k, top-p, min-p.
SAMPLINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-p": (0.8, 0, 0.95, 0.0),
    "top-k, top-p, min-p": (0.8, 50, 0.95, 0.05),
}


class Case(NamedTuple):
    """An operation of one size.

    `make(n)` gives n calls on inputs of their own.
    """

    make: Callable[[int], Iterable[Call]]
    num_bytes: float  # that a call must move
    set_bytes: int  # of one call's inputs that could stay in the L2 cache
    flops: float = 0.0
    is_captured: bool = True  # whether its calls can be captured in a graph


def attention_cases(
    device: torch.device,
    spec: ModelSpec,
    decodes: Sequence[tuple[int, int, str]],
    prefills: Sequence[tuple[int, int]],
) -> Iterator[tuple[str, Case]]:
    """Decode of rows of one context; a prompt, or the end of one."""
    heads = spec.num_heads * spec.head_dim
    for batch, context, kv_dtype in decodes:
        kv_bytes = batch * context * spec.kv_bytes_per_token(kv_dtype) // spec.num_layers
        in_and_out = 2 * batch * heads * ITEM
        yield (
            f"attention decode, {batch} x {context}, {kv_dtype}",
            Case(
                _attention(device, spec, [1] * batch, context, kv_dtype),
                kv_bytes + in_and_out,
                kv_bytes,
                4.0 * heads * batch * context,
            ),
        )
    for new, context in prefills:
        kv_bytes = context * spec.kv_bytes_per_token("bfloat16") // spec.num_layers
        pairs = new * (context - new) + new * (new + 1) / 2
        yield (
            f"attention prefill, {new} of {context}",
            Case(
                _attention(device, spec, [new], context, "bfloat16"),
                kv_bytes + 2 * new * heads * ITEM,
                kv_bytes,
                4.0 * heads * pairs,
                is_captured=False,
            ),
        )


def _attention(
    device: torch.device, spec: ModelSpec, lengths: list[int], context: int, kv_dtype: str
) -> Callable[[int], Iterator[Call]]:
    """One layer after another over pages in random order, each row with the same context."""

    def make(num_sets: int) -> Iterator[Call]:
        num_rows, num_tokens = len(lengths), sum(lengths)
        row_blocks = -(-context // BLOCK_SIZE)
        num_blocks = num_rows * row_blocks
        kv = KVPages(
            num_sets, num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, kv_dtype, device
        )
        _fill(kv)
        attention = choose("triton", spec, kv_dtype, BLOCK_SIZE, device)
        order = torch.randperm(num_blocks, device=device).int().view(num_rows, row_blocks)
        ends = torch.tensor([0, *lengths], device=device).cumsum(0)
        positions = torch.cat([torch.arange(context - n, context) for n in lengths])
        int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        batch = DeviceBatch(
            input_ids=torch.zeros(num_tokens, **int32),
            positions=positions.to(**int32),
            slots=torch.zeros(num_tokens, dtype=torch.int64, device=device),  # nothing is written
            rows=torch.arange(num_rows, **int32),
            query_start=ends.int(),
            context_len=torch.full((num_rows,), context, **int32),
            block_table=order,
            logit_rows=ends[1:] - 1,
            lengths=lengths,
            max_context_len=context,
            kv=kv,
            attention=attention,
        )
        is_decode = num_tokens == num_rows
        batch.meta = attention.capture(batch) if is_decode else attention.plan(batch)
        for index in range(num_sets):
            q = _randn(num_tokens, spec.num_heads, spec.head_dim, device=device)
            layer = PagedLayer(index, spec.head_dim**-0.5)
            yield partial(attention.forward, q, layer, batch)

    return make


def _fill(kv: KVPages) -> None:
    """Random numbers: their values are never near one another, as those of zeros are."""
    if kv.scales is None:
        kv.data.normal_()
        return
    kv.scales.fill_(0.02)
    for layer in kv.data:  # by layer: the copy that is converted is four times as large
        wide = torch.randn(layer.shape, device=layer.device).mul_(30).clamp_(-120, 120)
        layer.copy_(wide.round_() if kv.data.dtype == torch.int8 else wide)


def sampling_cases(
    device: torch.device, spec: ModelSpec, batches: Sequence[int]
) -> Iterator[tuple[str, Case]]:
    """From logits to tokens, by number of rows and kind."""
    for name, settings in SAMPLINGS.items():
        for batch in batches:
            num_bytes = batch * spec.vocab_size * ITEM
            make = partial(_sampling, device, spec.vocab_size, settings, batch)
            yield f"sample {name}, {batch}", Case(make, num_bytes, num_bytes)


def _sampling(
    device: torch.device,
    vocab_size: int,
    settings: tuple[float, int, float, float],
    batch: int,
    num_sets: int,
) -> Iterator[Call]:
    temperature, top_k, top_p, min_p = settings
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    for _ in range(num_sets):
        yield partial(
            sample,
            _randn(batch, vocab_size, device=device) * 3,
            rows,
            rows,
            torch.full((batch,), temperature, device=device),
            torch.full((batch,), top_k, dtype=torch.int32, device=device),
            torch.full((batch,), top_p, device=device),
            torch.full((batch,), min_p, device=device),
            torch.arange(batch, dtype=torch.int64, device=device),
            torch.empty(batch, dtype=torch.int32, device=device),
            num_searches=(top_k > 0) + (top_p < 1),
        )


def elementwise_cases(
    device: torch.device, spec: ModelSpec, tokens: Sequence[int]
) -> Iterator[tuple[str, Case]]:
    """Norm with its addition, activation with its product, rotation with the writing of keys."""
    hidden, inner = spec.hidden_size, Share(spec).intermediate_size
    query, stored = spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim
    # Numbers that a token moves. norm: two read, two written. rope: queries written back, keys and
    # values written to their pages.
    kinds = {
        "norm": (_norm, 4 * hidden),
        "gated": (_gated, 3 * inner),
        "rope and store": (_rope, (query + stored) + (query + stored)),
    }
    for name, (make, numbers) in kinds.items():
        for num_tokens in tokens:
            num_bytes = num_tokens * numbers * ITEM
            yield (
                f"{name}, {num_tokens}",
                Case(partial(make, device, spec, num_tokens), num_bytes, num_bytes),
            )


def _norm(device: torch.device, spec: ModelSpec, num_tokens: int, num_sets: int) -> Iterator[Call]:
    weight = torch.ones(spec.hidden_size, dtype=DTYPE, device=device)
    for _ in range(num_sets):
        x, residual = _randn(2, num_tokens, spec.hidden_size, device=device)
        yield partial(add_rms_norm, x, residual, weight, spec.norm.eps)


def _gated(device: torch.device, spec: ModelSpec, num_tokens: int, num_sets: int) -> Iterator[Call]:
    for _ in range(num_sets):
        yield partial(gated, _randn(num_tokens, 2 * Share(spec).intermediate_size, device=device))


def _rope(device: torch.device, spec: ModelSpec, num_tokens: int, num_sets: int) -> Iterator[Call]:
    heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    kv = KVPages(num_sets, num_blocks, BLOCK_SIZE, kv_heads, head_dim, "bfloat16", device)
    frequencies = torch.rand(head_dim // 2, device=device)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:num_tokens]
    for index in range(num_sets):
        yield partial(
            rope_store,
            _randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=device),
            frequencies,
            positions,
            slots,
            kv.key(index),
            kv.value(index),
            None,
            None,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )


def matmul_cases(
    device: torch.device,
    spec: ModelSpec,
    formats: Sequence[str],
    tokens: Sequence[int],
    few_tokens: Sequence[int],
) -> Iterator[tuple[str, Case]]:
    """A block's matrices in every format of the weights; all but the largest with few tokens."""
    block = [matrix for matrix in shapes_of(spec).matrices if matrix.role == "linear"][:4]
    qkv, output, joined, down = ((matrix.num_rows, matrix.num_columns) for matrix in block)
    matrices = {
        "gate and up": (joined, tokens),
        "qkv": (qkv, few_tokens),
        "output": (output, few_tokens),
        "down": (down, few_tokens),
    }
    for name in formats:
        form = scheme(name, "bfloat16").linear
        label = "bfloat16" if name == "none" else name
        for matrix, ((rows, columns), some_tokens) in matrices.items():
            weight_bytes = device_bytes(form, rows, columns)
            for num_tokens in some_tokens:
                num_bytes = weight_bytes + num_tokens * (rows + columns) * ITEM
                flops = 2.0 * num_tokens * rows * columns
                make = partial(_product, device, form, rows, columns, num_tokens)
                case = Case(make, num_bytes, weight_bytes, flops)
                yield f"product {label}, {matrix}, {num_tokens}", case


def _product(
    device: torch.device, form: Format, rows: int, columns: int, num_tokens: int, num_sets: int
) -> Iterator[Call]:
    x = _randn(num_tokens, columns, device=device)
    for _ in range(num_sets):
        weight = make_weight(form, rows, columns, DTYPE, device)
        weight.fill(0, _randn(rows, columns, device=device) * 0.02)
        weight.finish()
        yield partial(weight, x)


def _randn(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=device)

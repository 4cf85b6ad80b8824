"""The paged backend: mixed batches, plans that outlive a step, pages, and who is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from tests.models.llama_specs import SMALL, changed

from penstock.attention import paged as backend
from penstock.attention.paged import DeviceBatch, PagedLayer, TritonAttention, available, choose
from penstock.attention.pages import PAGE_DTYPES, SCALED, KVPages
from penstock.errors import ConfigError
from penstock.kernels import paged
from penstock.kernels.chip import HOPPER
from penstock.kernels.op import MODES, forced, triton_problem
from penstock.kernels.paged import Case, case_tensors
from penstock.kernels.paged_prefill import programs_at_once, schedule
from penstock.models.device_footprint import SPLIT_K_BYTES

CPU = torch.device("cpu")


class Shape(NamedTuple):
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Once through the kernels, once through their references."""
    if request.param == "triton" and triton_problem() is not None:
        pytest.skip(f"{triton_problem()}")
    with forced(request.param):
        yield request.param


def batch_of(case: Case, num_blocks: int) -> tuple[torch.Tensor, paged.Tensors, DeviceBatch]:
    """Queries, what the oracle reads, and the batch for a backend; pages of one layer of two."""
    t = case_tensors(case, CPU)
    kv = KVPages(2, num_blocks, case.block_size, case.num_kv_heads, case.head_dim, "float32")
    assert len(t.keys) <= num_blocks
    kv.key(1)[: len(t.keys)] = t.keys
    kv.value(1)[: len(t.keys)] = t.values
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
        max_context_len=max(case.contexts),
        kv=kv,
        attention=TritonAttention(Shape()),
    )
    return t.q, t._replace(keys=kv.key(1), values=kv.value(1)), batch


def expected(t: paged.Tensors, layer: PagedLayer) -> torch.Tensor:
    rows = range(len(t.rows))
    options = {"scale": layer.scale, "window": layer.window, "soft_cap": layer.soft_cap}
    t = t._replace(sinks=layer.sinks)
    return torch.cat([paged.attend_row(t, row, **options) for row in rows])


LAYERS = [
    PagedLayer(1, 0.25),
    PagedLayer(1, 0.3, window=9, soft_cap=4.0, sinks=torch.tensor([0.1, 2.0, -1.0, 0.5])),
    PagedLayer(1, 0.2, window=900, sinks=torch.tensor([0.1, 2.0, -1.0, 0.5])),
]


@pytest.mark.parametrize(
    ("lengths", "contexts"),
    [((1, 5, 1, 2), (300, 9, 1, 40)), ((1, 1), (3, 260)), ((6, 2), (6, 30)), ((1,), (1,))],
    ids=["mixed", "decode", "prefill", "one token"],
)
def test_every_layer_of_any_batch(
    lengths: tuple[int, ...], contexts: tuple[int, ...], mode: str
) -> None:
    q, t, batch = batch_of(Case("batch", lengths, contexts), 30)
    batch.meta = batch.attention.plan(batch)
    for layer in LAYERS:
        out = batch.attention.forward(q, layer, batch)
        torch.testing.assert_close(out, expected(t, layer), rtol=1e-4, atol=1e-5)


def test_long_contexts_of_few_new_tokens_are_shared(mode: str) -> None:
    """Beside rows of one token, in every layer, with a window, a cap, and sinks."""
    lengths, contexts = (1, 40, 1, 3, 20), (500, 1700, 2, 1100, 25)
    q, t, batch = batch_of(Case("long", lengths, contexts), 300)
    plan = batch.attention.plan(batch)
    assert plan.num_shares == 9, "only the bound is known: 3 for each"
    batch.contexts = list(contexts)
    batch.meta = plan = batch.attention.plan(batch)
    shares = [[1, 0, 0, 3], [1, 0, 1, 3], [1, 0, 2, 3], [3, 0, 0, 2], [3, 0, 1, 2]]
    assert plan.work.tolist() == [*shares, [4, 0, 0, 1]]
    assert plan.num_shares == 5
    for layer in LAYERS:
        out = batch.attention.forward(q, layer, batch)
        torch.testing.assert_close(out, expected(t, layer), rtol=1e-4, atol=1e-5)
        assert not plan.counters.any()


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_plan_of_memory_has_room_for_shares(head_dim: int, num_kv_heads: int) -> None:
    chip = HOPPER._replace(multiprocessors=160)
    for block_m in (64, 128):
        programs = programs_at_once(block_m, head_dim, num_kv_heads, chip)
        for rows, context in ((1, 131072), (7, 131072), (40, 131072), (3, 9000)):
            lengths, contexts = [2] * rows, [context - 7 * row for row in range(rows)]
            num_shares = schedule(lengths, contexts, block_m, programs)[1]
            num_bytes = num_shares * num_kv_heads * block_m * (head_dim + 1) * 4
            assert num_bytes <= SPLIT_K_BYTES
            assert num_bytes > 0 or rows > 1, "one long row has shares"


def test_a_plan_makes_tiles_of_prompts_and_lists_the_other_rows() -> None:
    _, _, batch = batch_of(Case("plan", (1, 70, 1, 2), (4, 70, 9, 2)), 10)
    plan = batch.attention.plan(batch)
    assert plan.decode_rows.tolist() == [0, 2]
    assert plan.block_m == 128
    assert plan.num_shares == 0
    batch.contexts = [4, 70, 9, 2]
    plan = batch.attention.plan(batch)
    tiles = [[1, 64, 0, 1], [1, 0, 0, 1], [3, 0, 0, 1]]
    assert plan.work.tolist() == tiles, "64 tokens of two heads a tile"
    assert len(plan.counters) >= 2 * 2
    assert not plan.counters.any()


def test_a_captured_plan_serves_later_contexts(mode: str) -> None:
    """The tensors stay, what is in them changes; the plan is not made again."""
    case = Case("captured", (1, 1, 1), (300, 40, 17))
    q, t, batch = batch_of(case, 40)
    for pages in (batch.kv.key(1), batch.kv.value(1)):  # tokens there will be later
        pages.nan_to_num_(0.5, 0.5)
    batch.max_context_len = 600
    batch.meta = batch.attention.capture(batch)
    layer = LAYERS[1]
    first = batch.attention.forward(q, layer, batch)
    torch.testing.assert_close(first, expected(t, layer), rtol=1e-4, atol=1e-5)

    batch.block_table[batch.rows[1].item(), 3:5] = torch.tensor([0, 1])
    batch.context_len.copy_(torch.tensor([1, 70, 16]))
    batch.rows.copy_(batch.rows[[1, 1, 2]].clone())
    batch.context_len[0] = 33
    batch.attention.refresh(batch, batch.meta)
    later = batch.attention.forward(q, layer, batch)
    assert not torch.allclose(first, later)
    torch.testing.assert_close(later, expected(t, layer), rtol=1e-4, atol=1e-5)
    eager = DeviceBatch(**{name: getattr(batch, name) for name in DeviceBatch.__dataclass_fields__})
    eager.max_context_len = 70
    eager.meta = eager.attention.plan(eager)
    replanned = eager.attention.forward(q, layer, eager)
    torch.testing.assert_close(later, replanned, rtol=1e-5, atol=1e-6)


def test_padding_reads_the_dummy_block_and_disturbs_nobody(mode: str) -> None:
    q, t, batch = batch_of(Case("padded", (1, 1, 1, 1), (20, 1, 1, 1)), 10)
    dummy_row = (int(batch.rows[0]) + 1) % len(batch.block_table)
    batch.rows[1:] = dummy_row
    batch.block_table[dummy_row] = batch.kv.dummy_block
    batch.meta = batch.attention.capture(batch)
    out = batch.attention.forward(q, LAYERS[0], batch)
    torch.testing.assert_close(out, expected(t, LAYERS[0]), rtol=1e-4, atol=1e-5)
    assert not out[1:].any(), "the dummy block holds zeros"


def test_larger_batches_leave_captured_plans_as_they_are() -> None:
    attention = TritonAttention(Shape())
    _, _, small = batch_of(Case("small", (1,), (4,)), 10)
    _, _, large = batch_of(Case("large", (1,) * 9, (4,) * 9), 10)
    captured = attention.capture(small)
    assert attention.capture(large).decode_rows.tolist() == list(range(9))
    assert captured.decode_rows.tolist() == [0]
    assert len(captured.counters) >= 2


@pytest.mark.parametrize("dtype", PAGE_DTYPES)
def test_pages_take_what_the_plan_of_memory_says(dtype: str) -> None:
    kv = KVPages(3, 5, 4, 2, 8, dtype)
    spec = changed(SMALL, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    assert kv.num_bytes == 6 * 4 * spec.kv_bytes_per_token(dtype)
    assert kv.dummy_block == 5
    assert kv.key(2).shape == kv.value(0).shape == (6, 2, 4, 8)
    kv.value(1).view(torch.uint8).fill_(1)
    assert not kv.key(1).float().any()
    assert not kv.value(0).float().any()
    for scale in (kv.key_scale(0), kv.value_scale(2)):
        assert (scale is not None) == (dtype in SCALED)
        if scale is not None:
            assert scale.shape == (6, 2, 4)
            assert not scale.any()


@pytest.mark.parametrize(
    ("shape", "kv_dtype", "block_size", "reason"),
    [
        (Shape(5, 2), "float32", 16, "`5` query heads cannot share `2` KV heads"),
        (Shape(head_dim=15), "float32", 16, "an even size from 8 to 256, not `15`"),
        (Shape(head_dim=512), "float32", 16, "an even size from 8 to 256, not `512`"),
        (Shape(), "int4", 16, "the KV format must be one of `float32`, "),
        (Shape(), "int8", 257, "a block must have 1 to 256 tokens, not `257`"),
    ],
)
def test_what_our_kernels_do_not_have(
    shape: Shape, kv_dtype: str, block_size: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    (told,) = available(shape, kv_dtype, block_size, CPU)["triton"]
    assert reason in told


def test_without_a_gpu_there_is_a_reason_unless_somebody_insists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "triton_problem", lambda: "there is no GPU")
    monkeypatch.delenv("PENSTOCK_KERNELS", raising=False)
    assert available(Shape(), "int8", 1, CPU)["triton"] == ["there is no GPU"]
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    assert available(Shape(), "int8", 1, CPU)["triton"] == []


def test_choice() -> None:
    with forced("reference"):
        assert choose("auto", Shape(), "fp8", 16, CPU).name == "triton"
        assert choose("triton", Shape(), "float32", 3, CPU).name == "triton"
        with pytest.raises(ConfigError, match="no attention backend `fast`") as unknown:
            choose("fast", Shape(), "float32", 16, CPU)
        assert unknown.value.hint == "Choose one of `auto`, `triton`, `flashinfer`."
        with pytest.raises(ConfigError, match="`flashinfer` cannot compute attention here: "):
            choose("flashinfer", Shape(), "float32", 16, CPU)
        with pytest.raises(ConfigError, match=r"`triton` cannot .* `flashinfer` cannot "):
            choose("auto", Shape(3, 2), "float32", 16, CPU)

"""What an engine on a device holds, and what sampling takes beside it, is what its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.helpers_live import LiveBytes

from penstock.attention import flashinfer, paged
from penstock.engine.backends import MAX_BLOCK_SIZE
from penstock.engine.build import make_runner
from penstock.engine.config import KV_CACHE_DTYPES, EngineConfig
from penstock.engine.memory import (
    MASK_BYTES,
    SHAPED_BYTES,
    SHAPED_LOGITS,
    MemoryPlan,
    plan_memory,
)
from penstock.kernels import gpu
from penstock.models import load
from penstock.models.device_footprint import (
    FLASHINFER_BYTES,
    activation_bytes,
    scratch_bytes,
    share_of,
    table_bytes,
)
from penstock.models.device_model import Share
from penstock.models.files import read_config
from penstock.models.load import Backends
from penstock.models.spec import ITEM_BYTES, ModelSpec
from penstock.quantization.schemes import DEVICE_NAMES
from penstock.sampling import device as sampling
from penstock.sampling.rows import SamplingRows
from penstock.types import SamplingParams

MEMORY = 2**34


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU as well: nothing can be captured of references."""
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    monkeypatch.setattr(load, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(gpu, "device", lambda rank=0: torch.device("cpu"))


def resolved(checkpoint: Path, **settings: object) -> tuple[EngineConfig, MemoryPlan]:
    spec = ModelSpec.from_hf(read_config(checkpoint))
    config = EngineConfig(model=str(checkpoint), backend="triton", **settings)  # type: ignore[arg-type]
    config = config.resolve(
        max_context_len=spec.max_context_len, checkpoint_dtype=spec.dtype, backends=Backends(spec)
    )
    return config, plan_memory(spec, config, MEMORY)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("quantization", DEVICE_NAMES)
def test_an_engine_at_rest(
    checkpoint: Path, quantization: str, kv_cache_dtype: str, enforce_eager: bool
) -> None:
    config, plan = resolved(
        checkpoint,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=enforce_eager,
        max_num_seqs=5,
        num_blocks=20,
        load_format="dummy",
    )
    spec = ModelSpec.from_hf(read_config(checkpoint))
    with LiveBytes() as live:
        runner = make_runner(checkpoint, config, plan.num_blocks, (0,), None, {})
    exact = plan.weight_bytes + plan.kv_bytes + plan.block_bytes
    tables = table_bytes(config.max_num_seqs, config.context_len, config.block_size)
    kept = config.max_num_seqs * spec.vocab_size * ITEM_BYTES[config.dtype]  # logits of graphs
    graphs = 0 if enforce_eager else kept + 24 * config.max_num_seqs + 64 * 8
    assert exact < live.live <= exact + tables + graphs
    assert exact + tables + graphs < plan.total_bytes - plan.runtime_bytes
    assert runner.depth == 1


@pytest.mark.parametrize(
    "params",
    [
        {"typical_p": 0.9, "top_p": 0.9},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_tokens": 3},
        {"logprobs": 20, "presence_penalty": 0.1},
        {"typical_p": 0.9, "presence_penalty": 0.5, "logprobs": 5, "logit_bias": {3: 1.0}},
    ],
)
def test_shaping_takes_what_is_planned(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch, whatever the number of rows; the kernel for the others has no scratch."""
    piece, vocab_size, num_rows = 2**16, 4001, 64
    monkeypatch.setattr(sampling, "PIECE", piece)
    state = SamplingRows(num_rows, 32)
    for row in range(num_rows):
        state.admit(row, [1, 2, 3], 3, SamplingParams(temperature=1.0, **params), row)
    rows = np.arange(num_rows, dtype=np.int32)
    sampler = sampling.DeviceSampler(num_rows + 1, vocab_size, (2,), torch.device("cpu"))
    sampler.admit(rows.tolist(), state)
    logits = torch.randn(num_rows, vocab_size)
    lengths = torch.full((num_rows,), 3, dtype=torch.int32)
    table = torch.zeros(num_rows + 1, 32, dtype=torch.int32)
    with LiveBytes() as live:
        sampler.sample(logits, torch.from_numpy(rows), lengths, rows, state, table)
    masks = num_rows * vocab_size * MASK_BYTES
    # A quarter is for what sorting takes on a GPU, which no tensor shows.
    assert piece // 4 < live.peak - masks <= piece * SHAPED_BYTES * 3 // 4 + 2**16


def test_what_no_graph_computes_is_not_planned_for_graphs(checkpoint: Path) -> None:
    """Beyond 512 rows their logits and their number stay what they are."""
    settings = {"num_blocks": 20, "max_num_batched_tokens": 2000}
    kept = []
    for num_rows in (512, 513, 2000):
        _, graphs = resolved(checkpoint, max_num_seqs=num_rows, **settings)
        _, eager = resolved(checkpoint, max_num_seqs=num_rows, enforce_eager=True, **settings)
        kept.append(graphs.workspace_bytes - eager.workspace_bytes)
    assert kept[0] == kept[1] == kept[2] > 0


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES[1:])
def test_auto_is_never_flashinfer(kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why its workspace is planned only where it is asked for by name."""
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu, "fp8_problem", lambda: None)
    device, num_able = torch.device("cuda"), 0
    for head_dim in range(1, 300):
        for heads in ((32, 8), (7, 7), (6, 4)):
            for block_size in (1, 16, 100, MAX_BLOCK_SIZE):  # what the engine lets through
                shape = Share(*heads, head_dim)
                told = paged.available(shape, kv_cache_dtype, block_size, device)
                assert told["flashinfer"] or not told["triton"]
                num_able += told["flashinfer"] == []
    assert (num_able > 0) == (kv_cache_dtype in ("bfloat16", "float16"))


def test_logits_are_planned_for_every_use(checkpoint: Path) -> None:
    """By hand for 300 rows: eager ones, those of graphs in their pool and beside it, masks."""
    settings = {"max_num_seqs": 300, "num_blocks": 20, "max_num_batched_tokens": 400}
    config, graphs = resolved(checkpoint, **settings)
    _, eager = resolved(checkpoint, enforce_eager=True, **settings)
    spec = ModelSpec.from_hf(read_config(checkpoint))
    item_bytes = ITEM_BYTES[config.dtype]
    logits = 300 * spec.vocab_size * item_bytes
    assert graphs.workspace_bytes - eager.workspace_bytes == 2 * logits
    tables = table_bytes(300, config.context_len, config.block_size)
    share = share_of(spec, 1)
    step = activation_bytes(share, config.dtype, "none", 400) + scratch_bytes(share)
    assert eager.workspace_bytes == (
        (logits + 300 * spec.hidden_size * item_bytes)
        + 300 * spec.vocab_size * MASK_BYTES
        + SHAPED_LOGITS * SHAPED_BYTES
        + tables
        + step
    )


def test_what_is_shaped_at_once_is_what_is_planned() -> None:
    assert sampling.PIECE == SHAPED_LOGITS


def test_flashinfers_workspace_is_planned(checkpoint: Path) -> None:
    from penstock.attention.flashinfer import WORKSPACE_BYTES

    settings = {"max_num_seqs": 4, "num_blocks": 20}
    _, ours = resolved(checkpoint, **settings)
    _, theirs = resolved(checkpoint, attention_backend="flashinfer", **settings)
    assert WORKSPACE_BYTES == FLASHINFER_BYTES
    assert theirs.workspace_bytes == ours.workspace_bytes + FLASHINFER_BYTES + 5 * 8 * 2**20

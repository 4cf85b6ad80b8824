"""A replay gives what an eager step gives, for every number of rows, whatever lay there before.

On a CPU a replay runs the same function over the same tensors; `gpu` tests capture real graphs.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.models.configs import CONFIGS
from tests.models.configs_dense import classes
from tests.models.device_helpers import load_device

from penstock.attention.paged import DeviceBatch
from penstock.layers.device_tables import DeviceTables
from penstock.models.device_model import DeviceModel
from penstock.models.graphs import DecodeGraphs

NUM_ROWS = 19
MAX_MODEL_LEN = 40
BLOCK_SIZE = 3


pytestmark = pytest.mark.usefixtures("references")


# Windows, caps and sandwiches; turns and norms in torch; learned positions and LayerNorm.
VARIANTS = [
    ("LlamaForCausalLM", "gqa"),
    ("Gemma2ForCausalLM", "plain"),
    ("PhiForCausalLM", "plain"),
    ("CohereForCausalLM", "normed"),
    ("GPT2LMHeadModel", "plain"),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(variant))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeviceModel:
    path = tmp_path_factory.mktemp("model")
    architecture, variant = request.param
    kind = classes(architecture)[1]
    config = kind(**CONFIGS[architecture][variant]).to_dict() | {"architectures": [architecture]}
    (path / "config.json").write_text(json.dumps(config))
    return load_device(path, load_format="dummy", block_size=BLOCK_SIZE)


@pytest.fixture
def tables(model: DeviceModel) -> DeviceTables:
    """Every row has random tokens and blocks of its own, and keys and values are there."""
    tables = DeviceTables(NUM_ROWS, MAX_MODEL_LEN, BLOCK_SIZE, model.kv.dummy_block, model.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(101, (NUM_ROWS, MAX_MODEL_LEN), generator=generator, dtype=torch.int32)
    tables.token_ids[:NUM_ROWS] = ids.to(model.device)
    num_blocks = tables.block_table.shape[1]
    blocks = torch.randperm(model.kv.num_blocks, generator=generator)[: NUM_ROWS * num_blocks]
    tables.block_table[:NUM_ROWS] = blocks.view(NUM_ROWS, num_blocks).to(model.device)
    model.kv.data.copy_(torch.randn(model.kv.data.shape, generator=generator))
    return tables


def numbers(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some rows in any order, and where each of them is."""
    random = np.random.default_rng(seed)
    rows = random.permutation(NUM_ROWS)[:num_rows].astype(np.int32)
    return rows, random.integers(0, MAX_MODEL_LEN, num_rows).astype(np.int32)


@torch.inference_mode()
def eager(
    model: DeviceModel, tables: DeviceTables, rows: np.ndarray, starts: np.ndarray
) -> torch.Tensor:
    """The logits, by hand: not through `step_inputs`."""
    at = torch.from_numpy(rows).to(model.device).long()
    positions = torch.from_numpy(starts).to(model.device).long()
    blocks = tables.block_table[at, positions // BLOCK_SIZE].long()
    batch = DeviceBatch(
        input_ids=tables.token_ids[at, positions],
        positions=positions.int(),
        slots=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        rows=at.int(),
        query_start=torch.arange(len(rows) + 1, dtype=torch.int32, device=model.device),
        context_len=positions.int() + 1,
        block_table=tables.block_table,
        logit_rows=torch.arange(len(rows), device=model.device),
        lengths=[1] * len(rows),
        max_context_len=int(starts.max()) + 1,
        kv=model.kv,
        attention=model.attention,
        contexts=(starts + 1).tolist(),
    )
    return model.logits(model.forward(batch))


@torch.inference_mode()
def replayed(
    graphs: DecodeGraphs, tables: DeviceTables, rows: np.ndarray, starts: np.ndarray
) -> torch.Tensor:
    padded = graphs.padded(rows, starts)
    tables.upload(padded, is_fixed=True)
    return graphs.replay(padded)[: len(rows)].clone()


def test_a_replay_is_an_eager_step(model: DeviceModel, tables: DeviceTables) -> None:
    graphs = DecodeGraphs(model, tables)
    assert graphs.sizes == [1, 2, 4, 8, 16, NUM_ROWS]  # each filled up and full
    garbage = [graphs._input_ids, graphs._positions, graphs._slots, tables._inputs]
    for num_rows in range(1, NUM_ROWS + 1):
        rows, starts = numbers(num_rows, num_rows)
        expected = eager(model, tables, rows, starts)
        pages = model.kv.data[:, :, : model.kv.dummy_block].clone()
        with torch.inference_mode():
            for tensor in garbage:
                tensor.fill_(10**6)
            graphs._logits.fill_(torch.nan)
        found = replayed(graphs, tables, rows, starts)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert len(found.unique(dim=0)) == num_rows
        # Padding has written to nobody's page, and the step what was there from the eager one.
        torch.testing.assert_close(
            model.kv.data[:, :, : model.kv.dummy_block], pages, atol=1e-5, rtol=0
        )


def test_the_numbers_of_a_step_are_read_anew(model: DeviceModel, tables: DeviceTables) -> None:
    """Tokens, blocks and contexts that change behind a capture."""
    graphs = DecodeGraphs(model, tables)
    rows, starts = numbers(8, 0)
    first = replayed(graphs, tables, rows, starts)
    changed = int(starts[0])
    tables.token_ids[int(rows[0]), changed] += 1
    tables.block_table[int(rows[1])] = tables.block_table[int(rows[1])].flip(0)
    starts[2] = (starts[2] + 7) % MAX_MODEL_LEN
    second = replayed(graphs, tables, rows, starts)
    assert [bool((a != b).any()) for a, b in zip(first, second, strict=True)] == [True] * 3 + [
        False
    ] * 5


@pytest.mark.gpu
def test_captured_graphs_are_eager_steps_to_the_last_bit(
    model: DeviceModel, tables: DeviceTables
) -> None:
    """Of the same padded rows: with fewer ones matmuls may add in another order."""
    graphs = DecodeGraphs(model, tables)
    for size in graphs.sizes:
        rows, starts = numbers(size, size)
        found = replayed(graphs, tables, rows, starts)
        batch, run = graphs._steps[size]
        assert "graph" in type(getattr(run, "__self__", None)).__name__.lower()
        with torch.inference_mode():
            graphs._logits.fill_(torch.nan)
            graphs._compute(batch, tables.inputs(size)[1])
        assert torch.equal(graphs._logits[:size], found), size

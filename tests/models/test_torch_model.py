"""What the engine relies on in a torch model, beside the right numbers (`test_parity.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models.configs import CONFIGS
from tests.models.helpers import MAX_BLOCK_SIZE, NUM_BLOCKS, Sessions, load

from penstock.errors import UnsupportedModel
from penstock.models.torch_model import TorchModel


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As much of a checkpoint as dummy weights need."""
    config = CONFIGS["LlamaForCausalLM"]["gqa"] | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_logits_of_some_rows_are_those_of_all(directory: Path) -> None:
    model = load(directory, load_format="dummy")
    batch = Sessions(model, block_size=16).batch({"a": [1, 2, 3], "b": [4], "c": [5, 6]})
    model.forward(batch)
    whole = model.logits(np.arange(6)).copy()
    assert (whole.dtype, whole.shape) == (np.float32, (6, 101))
    for rows in ([2, 3, 5], [0], [1, 4], list(range(6))):
        np.testing.assert_allclose(model.logits(np.array(rows)), whole[rows], atol=1e-6)


def test_a_batch_is_not_changed(directory: Path) -> None:
    model = load(directory, load_format="dummy")
    batch = Sessions(model, block_size=1).batch({"a": [1, 2, 3], "b": [4]})
    names = ("input_ids", "positions", "query_start", "context_len", "slot_mapping", "block_table")
    before = {name: getattr(batch, name).copy() for name in names}
    model.forward(batch)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(batch, name), array)


def test_it_brings_its_store_and_says_how_long_it_took(directory: Path) -> None:
    phases: dict[str, float] = {}
    model = load(directory, "bfloat16", load_format="dummy", phases=phases)
    assert isinstance(model, TorchModel)
    assert model.kv.num_slots == NUM_BLOCKS * MAX_BLOCK_SIZE
    assert model.kv.dtype == torch.bfloat16
    assert list(phases) == ["import", "load", "kv"]


def test_a_format_that_no_attention_has_is_refused(directory: Path) -> None:
    with pytest.raises(UnsupportedModel, match="float16"):
        load(directory, "float16", load_format="dummy")

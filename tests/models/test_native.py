"""The native model in every number format: what a row is does not hang on its batch.

`test_parity` compares it with transformers in float32.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.helpers import Sessions, load
from tests.models.test_parity import LEN, chunked, full, oracle, ragged, token_by_token

from penstock.errors import ModelLoadError
from penstock.native import library
from penstock.quantization.schemes import NATIVE_NAMES

pytestmark = [
    pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native library here"),
    pytest.mark.usefixtures("batch_invariant_isa"),
]

VARIANTS = ["gqa", "mlp_bias", "tied"]
FORMATS = [
    *(("float32", name, "float32") for name in NATIVE_NAMES),
    *(("bfloat16", name, "bfloat16") for name in NATIVE_NAMES),
    ("bfloat16", "int8", "int8"),
    ("bfloat16", "none", "int8"),
    ("float32", "none", "bfloat16"),
]
# How far logits may lie from those of float32: a share of their spread (weights are random, which
# quantizes worse than trained ones).
BOUNDS = {"none": 0.05, "int8": 0.1, "int4": 0.6}

Rows = dict[str, list[int]]
Logits = dict[str, torch.Tensor]


class Checkpoint(NamedTuple):
    path: Path
    rows: Rows
    exact: Logits  # by transformers, [LEN, V]


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    path = tmp_path_factory.mktemp("model")
    theirs = oracle("LlamaForCausalLM", request.param, 3)
    theirs.save_pretrained(path)
    ids = torch.randint(101, (4, LEN), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = theirs(ids).logits
    return Checkpoint(
        path,
        dict(zip("abcd", ids.tolist(), strict=True)),
        dict(zip("abcd", logits, strict=True)),
    )


def joined(sessions: Sessions, rows: Rows, way: Callable[[Sessions, Rows], list[Logits]]) -> Logits:
    parts: dict[str, list[torch.Tensor]] = {}
    for logits in way(sessions, rows):
        for name, part in logits.items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


@pytest.mark.parametrize(("dtype", "quantization", "kv_cache_dtype"), FORMATS)
def test_a_row_is_the_same_in_any_batch(
    checkpoint: Checkpoint, dtype: str, quantization: str, kv_cache_dtype: str
) -> None:
    """To the last bit: alone, in chunks, token by token, in company, on one thread or two."""
    options = {"backend": "native", "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    models = [load(checkpoint.path, dtype, num_threads=number, **options) for number in (1, 2)]
    whole = joined(Sessions(models[0], block_size=16), checkpoint.rows, full)
    for model in models:
        for block_size in (1, 16):
            for way in (full, chunked, token_by_token, ragged):
                sessions = Sessions(model, block_size=block_size)
                for name, found in joined(sessions, checkpoint.rows, way).items():
                    assert torch.equal(found, whole[name]), (way.__name__, name)
    for name, found in whole.items():
        exact = checkpoint.exact[name]
        error = (found - exact).square().mean().sqrt() / exact.std()
        assert error < BOUNDS[quantization.split("-")[0]], error
        if (dtype, quantization, kv_cache_dtype) != ("float32", "none", "float32"):
            assert error > 1e-4  # it is not fp32 in disguise


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_matrix_that_is_not_finite_is_named(
    checkpoint: Checkpoint, tmp_path: Path, quantization: str, value: float
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    shutil.copytree(checkpoint.path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][5, 3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"`{name}` .*row 5 of the source is not finite"):
        load(tmp_path, backend="native", quantization=quantization)
    load(tmp_path, backend="native")

"""A device model computes what transformers computes, on one rank and on several.

Without a GPU the references in plain torch compute, and a few steps go through Triton's
interpreter; the kernels have tests of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.configs_dense import DENSE
from tests.models.device_helpers import DeviceSessions, Threads, load_device
from tests.models.layouts import published
from tests.models.test_native import joined
from tests.models.test_parity import (
    LEN,
    TOLERANCE,
    VARIANTS,
    chunked,
    full,
    oracle,
    ragged,
    token_by_token,
)

from penstock.errors import ConfigError, ModelLoadError
from penstock.kernels.gpu import device
from penstock.kernels.op import forced
from penstock.layers.device_leaves import Linear
from penstock.models.blocks import MLP
from penstock.models.device_model import DeviceModel
from penstock.models.device_shapes import Share, why_not_shared
from penstock.models.files import read_config
from penstock.models.spec import ModelSpec
from penstock.parallel.group import Group
from penstock.quantization.device import Integers
from penstock.quantization.schemes import DEVICE_NAMES

Rows = dict[str, list[int]]
Logits = dict[str, torch.Tensor]

WAYS = (full, chunked, token_by_token, ragged)
EVERY_SIZE = {"LlamaForCausalLM", "Gemma2ForCausalLM"}  # of blocks; others have one of them
TAKEN = [
    (architecture, variant)
    for architecture, variant in VARIANTS
    if architecture in DENSE and variant != "narrow_heads"
]
ONE_OF_EACH = [
    *{architecture: (architecture, variant) for architecture, variant in TAKEN}.values(),
    ("CohereForCausalLM", "normed"),  # a scale for each head
]
NOT_SHARED = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}  # one norm over all heads

pytestmark = pytest.mark.usefixtures("references")


class Checkpoint(NamedTuple):
    path: Path
    rows: Rows
    expected: Logits  # of every position, [LEN, V], by transformers


def checkpoint(path: Path, architecture: str, variant: str) -> Checkpoint:
    theirs = oracle(architecture, variant, 3)
    theirs.save_pretrained(path)
    published(architecture, path)
    generator = torch.Generator().manual_seed(3)
    vocab_size = theirs.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (4, LEN), generator=generator)
    with torch.no_grad():
        logits = theirs(ids).logits
    rows = dict(zip("abcd", ids.tolist(), strict=True))
    return Checkpoint(path, rows, dict(zip("abcd", logits, strict=True)))


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("gqa"), "LlamaForCausalLM", "gqa")


def worst(found: Logits, expected: Logits) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def share_of_spread(found: Logits, expected: Logits) -> float:
    """The largest root mean square error of a row, as a share of its logits' spread."""
    errors = [
        (found[name] - expected[name]).square().mean().sqrt() / expected[name].std()
        for name in found
    ]
    return float(max(errors))


@pytest.mark.parametrize("variant", TAKEN, ids=lambda variant: "-".join(variant))
def test_logits_equal_transformers(tmp_path: Path, variant: tuple[str, str]) -> None:
    path, rows, expected = checkpoint(tmp_path, *variant)
    for block_size in (1, 3, 16) if variant[0] in EVERY_SIZE else (3,):
        model = load_device(path, block_size=block_size)
        for way in WAYS:
            found = joined(DeviceSessions(model), rows, way)
            assert worst(found, expected) < TOLERANCE, way.__name__
    assert min(float(logits.std()) for logits in expected.values()) > 0.1


def test_heads_that_are_too_narrow_are_refused(tmp_path: Path) -> None:
    path, *_ = checkpoint(tmp_path, "LlamaForCausalLM", "narrow_heads")
    with pytest.raises(ConfigError, match="`6`"):
        load_device(path)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8", "bfloat16", "float16"])
def test_narrow_pages_are_near(gqa: Checkpoint, kv_cache_dtype: str) -> None:
    model = load_device(gqa.path, kv_cache_dtype=kv_cache_dtype, block_size=3)
    bound = {"int8": 0.02, "fp8": 0.1, "bfloat16": 0.02, "float16": 0.003}[kv_cache_dtype]
    for way in (ragged, token_by_token):
        error = share_of_spread(joined(DeviceSessions(model), gqa.rows, way), gqa.expected)
        assert TOLERANCE / 10 < error < bound, error  # and not float32 in disguise


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_are_near(gqa: Checkpoint, dtype: str) -> None:
    model = load_device(gqa.path, dtype)
    error = share_of_spread(joined(DeviceSessions(model), gqa.rows, ragged), gqa.expected)
    assert TOLERANCE < error < {"bfloat16": 0.05, "float16": 0.01}[dtype], error


# How far logits may lie from those of float32, and from those of the numbers that the weights stand
# for: shares of their spread (weights are random, which quantizes worse than trained ones).
SCHEMES = {
    "int8-a16": (0.1, 1e-5),
    "int4-a16": (0.6, 1e-5),
    "int4-g128-a16": (0.7, 1e-5),
    "fp8": (0.3, 0.2),  # here the activations are quantized as well
    "fp8-block": (0.3, 0.2),
}


@torch.inference_mode()
def take_over(dense: DeviceModel, quantized: DeviceModel) -> None:
    """Give a dense model the numbers that the matrices of the other stand for."""
    for theirs, ours in zip(quantized.decoder.layers(), dense.decoder.layers(), strict=True):
        name = "weight" if isinstance(ours, Linear) else "table"
        if (matrix := getattr(ours, name, None)) is not None:
            ids = torch.arange(matrix.num_rows, device=dense.device)
            matrix.values.copy_(getattr(theirs, name).rows(ids))


@pytest.mark.parametrize("variant", ["gqa", "tied"])
@pytest.mark.parametrize("quantization", SCHEMES)
def test_quantized_weights_stand_for_numbers(
    tmp_path: Path, quantization: str, variant: str
) -> None:
    path, rows, expected = checkpoint(tmp_path, "LlamaForCausalLM", variant)
    model = load_device(path, quantization=quantization)
    found = joined(DeviceSessions(model), rows, ragged)
    far, near = SCHEMES[quantization]
    assert 1e-3 < share_of_spread(found, expected) < far
    dense = load_device(path)
    take_over(dense, model)
    stood_for = joined(DeviceSessions(dense), rows, ragged)
    assert share_of_spread(found, stood_for) < near


@pytest.mark.parametrize("variant", ["mlp_bias", "tied"])
def test_every_product_of_a_step_was_compiled_when_it_was_loaded(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight with the bias that it is used with."""
    warm, used = set[tuple[int, bool]](), set[tuple[int, bool]]()
    multiply = Integers.__call__

    def warm_up(weight: Integers, bias: torch.Tensor | None = None) -> None:
        warm.add((id(weight), bias is not None))

    def call(weight: Integers, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        used.add((id(weight), bias is not None))
        return multiply(weight, x, bias)

    monkeypatch.setattr(Integers, "warm_up", warm_up)
    monkeypatch.setattr(Integers, "__call__", call)
    oracle("LlamaForCausalLM", variant, 3).save_pretrained(tmp_path)
    model = load_device(tmp_path, quantization="int8-a16")
    assert not used
    DeviceSessions(model).step({"a": [1, 2, 3]})
    assert len(used) == 4 * model.spec.num_layers + 1
    assert warm == used


def test_every_scheme_is_tried() -> None:
    assert {"none", *SCHEMES} == set(DEVICE_NAMES)


@pytest.mark.parametrize("quantization", ["int8-a16", "fp8"])
def test_what_cannot_be_quantized_is_named(tmp_path: Path, quantization: str) -> None:
    path, *_ = checkpoint(tmp_path, "LlamaForCausalLM", "gqa")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=name):
        load_device(path, quantization=quantization)


# -- the kernels themselves, in a few steps ------------------------------------------------------


@pytest.mark.skipif(device().type == "cuda", reason="there the tests above use the kernels")
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
def test_interpreted_kernels_give_what_references_give(
    gqa: Checkpoint, kv_cache_dtype: str
) -> None:
    found = []
    for mode in ("triton", "reference"):
        with forced(mode):
            sessions = DeviceSessions(load_device(gqa.path, kv_cache_dtype=kv_cache_dtype))
            first = sessions.step({"a": gqa.rows["a"][:17], "b": gqa.rows["b"][:1]})
            second = sessions.step({"b": gqa.rows["b"][1:2], "a": gqa.rows["a"][17:18]})
            found.append([*first.values(), *second.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


# -- several ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "size"),
    [("gqa", 2), ("gqa", 4), ("mqa", 2), ("tied", 2), ("mlp_bias", 2), ("wide_heads", 4)],
)
def test_ranks_compute_what_one_computes(tmp_path: Path, variant: str, size: int) -> None:
    """KV heads fewer than ranks, a vocabulary that is not shared evenly, biases, tied tables."""
    path, rows, expected = checkpoint(tmp_path, "LlamaForCausalLM", variant)

    def of_rank(group: Group) -> tuple[DeviceModel, Logits]:
        model = load_device(path, group=group)
        return model, joined(DeviceSessions(model), rows, ragged)

    for model, found in Threads(size).run(of_rank):
        assert worst(found, expected) < TOLERANCE
        block, middle = model.decoder.blocks[0], Share(model.spec).intermediate_size
        assert isinstance(block.mlp, MLP)
        assert isinstance(block.mlp.up, Linear)
        assert isinstance(block.mlp.down, Linear)
        assert block.mlp.up.weight.num_rows == 2 * middle // size
        assert block.mlp.down.weight.num_columns == middle // size


@pytest.mark.parametrize("variant", ONE_OF_EACH, ids=lambda variant: "-".join(variant))
def test_ranks_share_every_architecture(tmp_path: Path, variant: tuple[str, str]) -> None:
    """Norms of heads, their own scales, sinks, partial and scaled turns, biases, positions."""
    path, rows, expected = checkpoint(tmp_path, *variant)
    spec = ModelSpec.from_hf(read_config(path))
    if why_not_shared(spec, 2) is not None:
        assert variant[0] in NOT_SHARED
        return
    assert variant[0] not in NOT_SHARED

    def of_rank(group: Group) -> Logits:
        model = load_device(path, group=group, block_size=3)
        return joined(DeviceSessions(model), rows, ragged)

    for found in Threads(2).run(of_rank):
        assert worst(found, expected) < TOLERANCE


def test_ranks_that_cannot_share(gqa: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="3"):
        load_device(gqa.path, group=Threads(3).view(0))


# -- weights that are drawn ----------------------------------------------------------------------


def test_dummy_weights_are_those_of_their_names(gqa: Checkpoint) -> None:
    """And the ranks hold shares of the same."""
    one, same = (load_device(gqa.path, load_format="dummy", seed=5) for _ in range(2))
    other = load_device(gqa.path, load_format="dummy", seed=6)
    found = [joined(DeviceSessions(model), gqa.rows, full) for model in (one, same, other)]
    assert worst(found[0], found[1]) == 0
    assert worst(found[0], found[2]) > 1e-3

    def of_rank(group: Group) -> Logits:
        model = load_device(gqa.path, load_format="dummy", seed=5, group=group)
        return joined(DeviceSessions(model), gqa.rows, full)

    for logits in Threads(2).run(of_rank):
        assert worst(logits, found[0]) < 1e-5

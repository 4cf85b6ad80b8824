"""fp8 checkpoints: against known bytes and transformers' own dequantization."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantization.helpers_stored import message_of, only, precision, same_in_parts, stored
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import CodeForm

CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
MODULE = "model.layers.0.self_attn.q_proj"


def drawn(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(num_rows, num_columns, generator=generator) * 100
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)


def test_known_bytes() -> None:
    """One, the largest number, the least denormal and minus one, in two blocks of 16 columns."""
    octets = torch.tensor([0x38, 0x7E, 0x01, 0xB8] * 8, dtype=torch.uint8).reshape(1, 32)
    matrix = only(
        precision(**CONFIG | {"weight_block_size": [1, 16]}),
        MODULE,
        weight=octets.view(torch.float8_e4m3fn),
        weight_scale_inv=torch.tensor([[1.0, 0.5]]),
    )
    assert matrix.form == CodeForm("e4m3", 16)
    one = [1.0, 448.0, 2.0**-9, -1.0]
    numbers = same_in_parts(matrix)
    assert numbers[0, :16].tolist() == one * 4
    assert numbers[0, 16:].tolist() == [number / 2 for number in one] * 4


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.sampled_from([(16, 32), (128, 128), (1, 32), (24, 16)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]),
    seed=st.integers(0, 2**32),
)
def test_as_transformers_has_it(
    blocks: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    weight = drawn(blocks[0] * block[0], blocks[1] * block[1], seed)
    scales = (torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) + 0.01).to(dtype)
    wanted = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scales, torch.float32)
    reader = precision(
        **CONFIG | {"weight_block_size": list(block)},
        scale_fmt="ue8m0" if dtype == torch.float8_e8m0fnu else "float",
    )
    matrix = only(reader, MODULE, weight=weight, weight_scale_inv=scales)
    np.testing.assert_array_equal(same_in_parts(matrix), wanted.numpy())


def test_blocks_at_the_edge_are_cut() -> None:
    weight, scales = drawn(300, 200), torch.rand(3, 2)
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    matrix = only(precision(**CONFIG), MODULE, weight=weight, weight_scale_inv=scales)
    np.testing.assert_array_equal(same_in_parts(matrix), (weight.float() * each).numpy())


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.ones(1, 1) / 4])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale(scale: torch.Tensor, name: str) -> None:
    weight = drawn(5, 40)
    reader = precision(quant_method="fp8", activation_scheme="static")
    matrix = only(reader, MODULE, weight=weight, **{name: scale})
    assert matrix.form == CodeForm("e4m3", 0)
    np.testing.assert_array_equal(same_in_parts(matrix), weight.float().numpy() / 4)


def test_scales_of_activations_are_dropped_and_plain_modules_stay() -> None:
    norm = stored("model.norm.weight", torch.ones(4))
    head = stored("lm_head.weight", torch.ones(4, 4))
    tensors = [
        head,
        stored(f"{MODULE}.weight", drawn(8, 8)),
        stored(f"{MODULE}.input_scale", torch.ones(1)),
        stored(f"{MODULE}.weight_scale", torch.ones(1)),
        norm,
    ]
    found = precision(quant_method="fp8").join(tensors)
    assert [part.name for part in found] == [head.name, f"{MODULE}.weight", norm.name]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight": None}, f"`{MODULE}.weight` is missing"),
        ({"weight": torch.ones(256, 256)}, "is of type F32, not F8_E4M3"),
        ({"weight_scale_inv": torch.ones(2, 3)}, "has shape [2, 3], not [2, 2]"),
        ({"weight_scale_inv": torch.ones(4)}, "has shape [4], not [2, 2]"),
        ({"weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, "is of type I32"),
        ({"weight_scale": torch.ones(2, 2)}, "both `.weight_scale_inv` and `.weight_scale`"),
    ],
)
def test_damaged(change: dict[str, Any], problem: str) -> None:
    tensors = {"weight": drawn(256, 256), "weight_scale_inv": torch.ones(2, 2)} | change
    with pytest.raises(ModelLoadError) as caught:
        only(precision(**CONFIG), MODULE, **{k: v for k, v in tensors.items() if v is not None})
    assert problem in message_of(caught.value)


def test_a_power_that_is_no_number() -> None:
    scales = torch.full((1, 1), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    matrix = only(precision(**CONFIG), MODULE, weight=drawn(8, 8), weight_scale_inv=scales)
    with pytest.raises(ModelLoadError, match="no numbers"):
        matrix.rows(0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [128]),
        ("weight_block_size", [128, 0]),
        ("weight_block_size", [128, 48.0]),
        ("weight_block_size", [128, 24]),
        ("weight_block_size", 128),
        ("activation_scheme", "none"),
        ("fmt", "e5m2"),
        ("scale_fmt", "e5m2"),
        ("expert_dtype", "fp4"),
        ("kv_cache_scheme", {"num_bits": 8}),
        ("modules_to_convert", ["embed"]),
    ],
)
def test_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        precision(**CONFIG | {key: value})
    assert f"quantization_config.{key}" in message_of(caught.value)


def test_which_modules() -> None:
    without = precision(**CONFIG)
    assert without.form("model.layers.0.mlp.up_proj.weight", (256, 256)) == CodeForm("e4m3", 128)
    for name in ("lm_head", "model.embed_tokens", "model.layers.3.mlp.gate"):
        assert without.form(f"{name}.weight", (256, 256)) is None
    listed = precision(**CONFIG, ignored_layers=["model.layers.0.mlp.up_proj", "re:.*k_proj"])
    assert listed.form("model.layers.0.mlp.up_proj.weight", (8, 8)) is None
    assert listed.form("model.layers.0.self_attn.k_proj.weight", (8, 8)) is None
    assert listed.form("model.layers.0.self_attn.v_proj.weight", (8, 8)) is not None
    assert without.name == "fp8, blocks of 128 x 128, activations in 16 bits"

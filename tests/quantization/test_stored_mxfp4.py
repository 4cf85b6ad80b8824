"""GPT-OSS checkpoints: against known bytes and transformers' own dequantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantization.helpers_stored import message_of, precision, same_in_parts, stored
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from penstock.errors import ModelLoadError
from penstock.quantization.codes import CodedTensor, CodeForm, CutTensor, StoredTensor
from penstock.quantization.mxfp4 import split_experts

CONFIG: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
EXPERTS = "model.layers.3.mlp.experts"


def joined(**tensors: Any) -> dict[str, Any]:
    found = precision(**CONFIG).join(
        [stored(f"{EXPERTS}.{name}", value) for name, value in tensors.items()]
    )
    return {part.name.removeprefix(f"{EXPERTS}."): part for part in found}


def numbers_of(tensor: Any) -> torch.Tensor:
    tensor = tensor.copied() if isinstance(tensor, CutTensor) else tensor
    return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).reshape(tensor.shape)


def test_known_bytes() -> None:
    """The sixteen numbers of e2m1 in turn, low nibble first, times 2 ** (128 - 127)."""
    octets = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8)
    blocks = np.tile(octets, 2).reshape(1, 1, 1, 16)
    found = joined(down_proj_blocks=blocks, down_proj_scales=np.full((1, 1, 1), 128, np.uint8))
    (matrix,) = found.values()
    half = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert matrix.values()[0].tolist() == (half + [-number for number in half]) * 2
    assert matrix.form == CodeForm("fp4", 32)
    assert matrix.num_bytes == 17


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(1, 3),
    num_rows=st.integers(1, 5).map(lambda size: 2 * size),
    num_groups=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_as_transformers_has_it(
    num_experts: int, num_rows: int, num_groups: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (num_experts, num_rows, num_groups)
    blocks = random.integers(0, 256, (*shape, 16), np.uint8)
    scales = random.integers(0, 253, shape, np.uint8)  # up to 6 * 2 ** 125
    wanted = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    ).numpy()  # [experts, columns, rows]
    found = joined(gate_up_proj_blocks=blocks, gate_up_proj_scales=scales)
    assert len(found) == 2 * num_experts
    for expert in range(num_experts):
        for index, projection in enumerate(("gate", "up")):
            matrix = found[f"{expert}.{projection}_proj.weight"]
            assert isinstance(matrix, CodedTensor)
            numbers = same_in_parts(matrix)
            np.testing.assert_array_equal(numbers, wanted[expert, :, index::2].T)
    found = joined(down_proj_blocks=blocks, down_proj_scales=scales)
    for expert in range(num_experts):
        numbers = same_in_parts(found[f"{expert}.down_proj.weight"])
        np.testing.assert_array_equal(numbers, wanted[expert].T)


def test_the_least_scale_is_a_denormal() -> None:
    blocks = np.full((1, 1, 1, 16), 0x11, np.uint8)
    found = joined(down_proj_blocks=blocks, down_proj_scales=np.zeros((1, 1, 1), np.uint8))
    assert found["0.down_proj.weight"].values()[0, 0] == 2.0**-128


def test_biases_and_plain_experts() -> None:
    torch.manual_seed(0)
    joint, down = torch.randn(2, 32, 6).bfloat16(), torch.randn(2, 3, 32).bfloat16()
    joint_bias, down_bias = torch.randn(2, 6).bfloat16(), torch.randn(2, 32).bfloat16()
    other = stored("model.norm.weight", torch.ones(4))
    tensors = [
        other,
        stored(f"{EXPERTS}.gate_up_proj", joint),
        stored(f"{EXPERTS}.gate_up_proj_bias", joint_bias),
        stored(f"{EXPERTS}.down_proj", down),
        stored(f"{EXPERTS}.down_proj_bias", down_bias),
    ]
    found = {part.name: part for part in split_experts(tensors)}
    assert len(found) == 13
    assert found[other.name] is other
    for expert in range(2):
        for index, projection in enumerate(("gate", "up")):
            name = f"{EXPERTS}.{expert}.{projection}_proj"
            assert torch.equal(numbers_of(found[f"{name}.weight"]), joint[expert, :, index::2].T)
            assert torch.equal(numbers_of(found[f"{name}.bias"]), joint_bias[expert, index::2])
        name = f"{EXPERTS}.{expert}.down_proj"
        assert torch.equal(numbers_of(found[f"{name}.weight"]), down[expert].T)
        assert torch.equal(numbers_of(found[f"{name}.bias"]), down_bias[expert])
    quantized = precision(**CONFIG).join(tensors)
    assert [part.name for part in quantized] == list(found)


BLOCKS, SCALES = np.zeros((2, 4, 2, 16), np.uint8), np.zeros((2, 4, 2), np.uint8)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"down_proj_blocks": BLOCKS}, "down_proj_scales` is missing"),
        ({"down_proj_scales": SCALES}, "whose `_blocks` is missing"),
        (
            {"down_proj_blocks": BLOCKS, "down_proj_scales": SCALES[:1]},
            "has shape [1, 4, 2], not [2, 4, 2]",
        ),
        ({"down_proj_blocks": BLOCKS[..., :8], "down_proj_scales": SCALES}, "any, any, any, 16]"),
        ({"down_proj_blocks": BLOCKS.view(np.int8), "down_proj_scales": SCALES}, "I8, not U8"),
        (
            {"gate_up_proj_blocks": BLOCKS[:, :3], "gate_up_proj_scales": SCALES[:, :3]},
            "gate and up cannot share",
        ),
        ({"q_proj_blocks": BLOCKS, "q_proj_scales": SCALES}, "neither of `gate_up_proj`"),
        ({"gate_up_proj_bias": np.zeros((2, 3), np.float32)}, "gate and up cannot share"),
        ({"down_proj_bias": np.zeros((2, 3, 1), np.float32)}, "not [any, any]"),
        ({"down_proj": np.zeros((2, 3), np.float32)}, "not [any, any, any]"),
        ({"down_proj": np.zeros((2, 3, 1), np.int32)}, "is of type I32"),
    ],
)
def test_damaged(tensors: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        joined(**tensors)
    assert problem in message_of(caught.value)


def test_a_scale_that_is_no_number() -> None:
    scales = SCALES.copy()
    scales[1, 2, 0] = 255
    found = joined(down_proj_blocks=BLOCKS, down_proj_scales=scales)
    found["0.down_proj.weight"].rows(0, 4)
    with pytest.raises(ModelLoadError, match="no numbers"):
        found["1.down_proj.weight"].rows(0, 4)


def test_which_modules() -> None:
    reader = precision(**CONFIG)
    for projection in ("gate", "up", "down"):
        name = f"{EXPERTS}.17.{projection}_proj.weight"
        assert reader.form(name, (2880, 2880)) == CodeForm("fp4", 32)
    for name in ("mlp.router", "self_attn.q_proj", "mlp.down_proj"):
        assert reader.form(f"model.layers.3.{name}.weight", (2880, 2880)) is None
    without = precision(quant_method="mxfp4", modules_to_not_convert=[EXPERTS])
    assert without.form(f"{EXPERTS}.1.up_proj.weight", (2880, 2880)) is None


def test_a_small_file_of_very_many_experts() -> None:
    """Each of its parts takes hundreds of bytes of memory: so many are refused, and at once."""
    numbers = np.zeros(4096 * 2 * 16, np.uint8)
    plain = [
        StoredTensor(f"a{index}.mlp.experts.gate_up_proj", "BF16", (4096, 1, 2), numbers[:16384])
        for index in range(40)
    ]
    coded = [
        StoredTensor(f"a{index}.mlp.experts.gate_up_proj_{kind}", "U8", shape, numbers[:num_bytes])
        for index in range(40)
        for kind, shape, num_bytes in (
            ("blocks", (4096, 2, 1, 16), len(numbers)),
            ("scales", (4096, 2, 1), 4096 * 2),
        )
    ]
    reader = precision(quant_method="mxfp4")
    for tensors in (plain, coded):
        with pytest.raises(ModelLoadError, match="parts"):
            reader.join(tensors)

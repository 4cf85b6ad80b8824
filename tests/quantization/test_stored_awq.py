"""AWQ checkpoints: against a known word and a plain unpacking of the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.quantization.helpers_stored import message_of, only, precision, same_in_parts

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import CodeForm

CONFIG: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "version": "gemm",
    "zero_point": True,
}
MODULE = "model.layers.0.self_attn.q_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(numbers: NDArray[Any]) -> NDArray[np.int32]:
    """[K, N] to [K, N / 8], as `WQLinear_GEMM.from_linear` of AutoAWQ packs.

    https://github.com/casper-hansen/AutoAWQ/blob/main/awq/modules/linear/gemm.py
    """
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for word in range(packed.shape[1]):
        for index, row in enumerate(ORDER):
            packed[:, word] |= numbers[:, 8 * word + row].astype(np.uint32) << np.uint32(4 * index)
    return packed.view(np.int32)


def test_known_bytes() -> None:
    """Eight rows with the codes 0 to 7, of zero 1 and scale 2."""
    qweight = np.full((32, 1), 0x75316420, np.int32)
    matrix = only(
        precision(**CONFIG),
        MODULE,
        qweight=qweight,
        qzeros=np.array([[0x11111111]], np.int32),
        scales=np.full((1, 8), 2, np.float16),
    )
    assert matrix.form == CodeForm("uint4", 32, has_minima=True)
    numbers = same_in_parts(matrix)
    assert numbers.tolist() == [[2.0 * (row - 1)] * 32 for row in range(8)]


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 5).map(lambda size: 8 * size),
    num_groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, -1]),
    seed=st.integers(0, 2**32),
)
def test_unpacked(num_rows: int, num_groups: int, group_size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    num_columns = 32 * num_groups
    columns = group_size if group_size > 0 else num_columns
    shape = (-(-num_columns // columns), num_rows)
    codes = random.integers(0, 16, (num_columns, num_rows))
    zeros = random.integers(0, 16, shape)
    scales = random.normal(size=shape).astype(np.float16)
    matrix = only(
        precision(**CONFIG | {"group_size": group_size}),
        MODULE,
        qweight=words(codes),
        qzeros=words(zeros),
        scales=scales,
    )
    each = np.repeat(np.arange(shape[0]), columns)[:num_columns]
    wanted = (codes - zeros[each]).astype(np.float32) * scales.astype(np.float32)[each]
    np.testing.assert_array_equal(same_in_parts(matrix), wanted.T)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scales": None}, f"`{MODULE}.scales` is missing"),
        ({"qzeros": None}, f"`{MODULE}.qzeros` is missing"),
        ({"qweight": None}, "whose `.qweight` is missing"),
        ({"scales": np.ones((2, 8), np.float16)}, "has shape [2, 8], not [2, 16]"),
        ({"qzeros": np.ones((2, 16), np.int32)}, "has shape [2, 16], not [2, 2]"),
        ({"qweight": np.ones((64, 2), np.int8)}, "is of type I8, not I32"),
    ],
)
def test_damaged(change: dict[str, Any], problem: str) -> None:
    tensors: dict[str, Any] = {
        "qweight": np.ones((64, 2), np.int32),
        "qzeros": np.ones((2, 2), np.int32),
        "scales": np.ones((2, 16), np.float16),
    } | change
    with pytest.raises(ModelLoadError) as caught:
        only(precision(**CONFIG), MODULE, **{k: v for k, v in tensors.items() if v is not None})
    assert problem in message_of(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", 8), ("version", "gemv"), ("zero_point", False), ("group_size", 40)],
)
def test_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        precision(**CONFIG | {key: value})
    assert f"quantization_config.{key}" in message_of(caught.value)


def test_which_modules() -> None:
    reader = precision(
        **CONFIG | {"version": "GEMM"},
        modules_to_not_convert=["model.layers.0.", "self_attn", "visual", "gate"],
    )

    def is_coded(name: str) -> bool:
        return reader.form(f"{name}.weight", (64, 64)) is not None

    assert is_coded("model.layers.1.mlp.gate_proj")
    assert is_coded("model.layers.10.mlp.gate_proj")
    assert not is_coded("model.layers.0.mlp.gate_proj")
    assert not is_coded("model.layers.1.self_attn.q_proj")
    assert not is_coded("visual.blocks.1.mlp.fc1")
    assert not is_coded("model.layers.1.mlp.gate")
    assert not is_coded("lm_head")
    assert not is_coded("model.embed_tokens")
    assert reader.name == "AWQ, 4 bits in groups of 32"


def test_autoawqs_own_names() -> None:
    reader = precision(quant_method="awq", w_bit=4, q_group_size=64, version="GEMM")
    form = reader.form("model.layers.0.mlp.up_proj.weight", (64, 64))
    assert form == CodeForm("uint4", 64, has_minima=True)

"""GPTQ checkpoints: against bytes worked out by hand and a plain unpacking of the layout."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.quantization.helpers_stored import message_of, only, precision, same_in_parts, stored

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import CodeForm

CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
MODULE = "model.layers.0.self_attn.q_proj"


def words(numbers: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Numbers packed along the first axis, the first one lowest: `QuantLinear.pack` of AutoGPTQ.

    https://github.com/AutoGPTQ/AutoGPTQ/blob/main/auto_gptq/nn_modules/qlinear/qlinear_cuda.py
    """
    per_word = 32 // bits
    packed = np.zeros((-(-len(numbers) // per_word), *numbers.shape[1:]), np.uint32)
    for index, row in enumerate(numbers):
        packed[index // per_word] |= row.astype(np.uint32) << np.uint32(bits * (index % per_word))
    return packed.view(np.int32)


def layer(
    codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], bits: int, offset: int
) -> dict[str, NDArray[Any]]:
    """Tensors of a module: codes [N, K], zeros and scales [N, G]."""
    stored_zeros = (zeros.astype(np.int64) - offset) % 2**bits
    return {
        "qweight": words(codes.T, bits),
        "qzeros": words(stored_zeros, bits).T.copy(),
        "scales": scales.T.copy(),
    }


def plain(
    codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], group_size: int
) -> NDArray[np.float32]:
    """scale * (code - zero), number by number."""
    numbers = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = column // group_size
            difference = int(codes[row, column]) - int(zeros[row, group])
            numbers[row, column] = np.float32(scales[row, group]) * np.float32(difference)
    return numbers


def test_known_bytes() -> None:
    """Eight columns of eight rows: row 0 has the codes 0 to 7, of zero 8 and scale 0.5."""
    qweight = np.full((1, 8), 0x08080808, np.int32)
    qweight[0, 0] = 0x76543210
    matrix = only(
        precision(quant_method="gptq", bits=4, group_size=-1, sym=True),
        MODULE,
        qweight=qweight,
        qzeros=np.array([[0x77777777]], np.int32),  # 8, stored less one
        scales=np.full((1, 8), 0.5, np.float16),
    )
    assert matrix.form == CodeForm("int4", 0)
    numbers = same_in_parts(matrix)
    assert numbers[0].tolist() == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    assert numbers[1].tolist() == [0.0, -4.0] * 4


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 4).map(lambda size: 8 * size),
    num_groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, -1]),
    bits=st.sampled_from([4, 8]),
    is_symmetric=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    seed=st.integers(0, 2**32),
)
def test_unpacked(
    num_rows: int,
    num_groups: int,
    group_size: int,
    bits: int,
    is_symmetric: bool,
    version: str,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    num_columns = 32 * num_groups  # the last group of 64 may be cut
    columns = group_size if group_size > 0 else num_columns
    shape = (num_rows, -(-num_columns // columns))
    codes = random.integers(0, 2**bits, (num_rows, num_columns))
    zeros = random.integers(0, 2**bits, shape)
    if is_symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = random.normal(size=shape).astype(np.float16)
    reader = precision(
        **CONFIG
        | {"bits": bits, "group_size": group_size, "sym": is_symmetric}
        | {"checkpoint_format": version}
    )
    tensors = layer(codes, zeros, scales, bits, int(version == "gptq"))
    tensors["g_idx"] = np.arange(num_columns, dtype=np.int32) // columns
    matrix = only(reader, MODULE, **tensors)
    assert matrix.form.has_minima == (not is_symmetric)
    assert matrix.form.bits == bits
    np.testing.assert_array_equal(same_in_parts(matrix), plain(codes, zeros, scales, columns))


def tensors_of_one() -> dict[str, NDArray[Any]]:
    codes = np.arange(16 * 64).reshape(16, 64) % 16
    zeros, scales = np.full((16, 2), 8), np.ones((16, 2), np.float16)
    return layer(codes, zeros, scales, 4, 1)


def test_the_rest_stays_in_place() -> None:
    tensors = [stored(f"{MODULE}.{name}", value) for name, value in tensors_of_one().items()]
    bias, norm = (
        stored(f"{MODULE}.bias", np.ones(16, np.float32)),
        stored("norm.weight", np.ones(4, np.float32)),
    )
    found = precision(**CONFIG).join([norm, tensors[2], bias, tensors[0], tensors[1]])
    assert [part.name for part in found] == ["norm.weight", f"{MODULE}.bias", f"{MODULE}.weight"]
    assert found[0] is norm


def test_a_bfloat16_scale() -> None:
    tensors: dict[str, Any] = tensors_of_one()
    tensors["scales"] = torch.full((2, 16), 1.5, dtype=torch.bfloat16)
    assert only(precision(**CONFIG), MODULE, **tensors).values().max() == 1.5 * 7


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scales": None}, f"`{MODULE}.scales` is missing"),
        ({"qzeros": None}, f"`{MODULE}.qzeros` is missing"),
        ({"qweight": None}, "whose `.qweight` is missing"),
        ({"scales": np.ones((3, 16), np.float16)}, "has shape [3, 16], not [2, 16]"),
        ({"scales": np.ones((2, 16), np.int32)}, "is of type I32, not F32 or F16 or BF16"),
        ({"qzeros": np.ones((2, 1), np.int32)}, "has shape [2, 1], not [2, 2]"),
        ({"qweight": np.ones((8, 16), np.float32)}, "is of type F32, not I32"),
        ({"qweight": np.ones(128, np.int32)}, "has shape [128], not [any, any]"),
        ({"g_idx": np.zeros(3, np.int32)}, "has shape [3], not [64]"),
    ],
)
def test_damaged(change: dict[str, Any], problem: str) -> None:
    tensors = {
        name: value for name, value in (tensors_of_one() | change).items() if value is not None
    }
    with pytest.raises(ModelLoadError) as caught:
        only(precision(**CONFIG), MODULE, **tensors)
    assert problem in message_of(caught.value)
    assert MODULE in caught.value.message


def test_too_few_bytes() -> None:
    tensors = [stored(f"{MODULE}.{name}", value) for name, value in tensors_of_one().items()]
    tensors[0] = tensors[0]._replace(data=tensors[0].data[:-4])
    with pytest.raises(ModelLoadError, match="508` bytes"):
        precision(**CONFIG).join(tensors)


def test_twice() -> None:
    tensors = [stored(f"{MODULE}.{name}", value) for name, value in tensors_of_one().items()]
    for tensor in tensors:
        with pytest.raises(ModelLoadError, match="there twice"):
            precision(**CONFIG).join([*tensors, tensor])


def test_a_lie_about_symmetry() -> None:
    tensors = tensors_of_one()
    tensors["qzeros"][1, 1] += 1
    matrix = only(precision(**CONFIG), MODULE, **tensors)
    with pytest.raises(ModelLoadError, match=r"quantization_config\.sym` is true"):
        matrix.rows(0, 16)


def test_columns_in_the_order_of_activations() -> None:
    groups = np.arange(64, dtype=np.int32)[::-1].copy() // 32
    with pytest.raises(UnsupportedModel, match=r"quantization_config\.desc_act"):
        only(precision(**CONFIG, desc_act=True), MODULE, **tensors_of_one(), g_idx=groups)
    trivial = np.arange(64, dtype=np.int32) // 32  # as `static_groups` leaves it
    only(precision(**CONFIG, desc_act=True), MODULE, **tensors_of_one(), g_idx=trivial)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 3),
        ("bits", None),
        ("bits", "4"),
        ("bits", True),
        ("group_size", 24),
        ("group_size", 0),
        ("group_size", None),
        ("sym", "yes"),
        ("checkpoint_format", "marlin"),
        ("format", "bitblas"),
        ("is_marlin_format", True),
        ("pack_dtype", "int16"),
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_not_convert", [1]),
        ("dynamic", []),
        ("dynamic", {"+:a": {"bits": 2}}),
        ("dynamic", {"-:a(?=b)": {}}),
    ],
)
def test_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        precision(**CONFIG | {key: value})
    assert f"quantization_config.{key}" in message_of(caught.value)


def test_which_modules() -> None:
    reader = precision(
        **CONFIG,
        dynamic={
            r"-:.*\.mlp\.shared.*": {},
            r".*\.1\..*down_proj": {"bits": 8, "group_size": -1, "sym": False},
        },
    )

    def form(name: str) -> CodeForm | None:
        return reader.form(name, (64, 64))

    assert form("model.layers.0.mlp.up_proj.weight") == CodeForm("int4", 32)
    assert form("model.layers.1.mlp.down_proj.weight") == CodeForm("uint8", 0, has_minima=True)
    for name in ("embed_tokens", "layers.0.mlp.shared_expert.up_proj", "layers.0.mlp.gate"):
        assert form(f"model.{name}.weight") is None
    assert form("lm_head.weight") is None
    assert precision(**CONFIG, lm_head=True).form("lm_head.weight", (64, 64)) is not None
    within = precision(
        **CONFIG, modules_in_block_to_quantize=[["self_attn.k_proj"], ["mlp.up_proj"]]
    )
    assert within.form("model.layers.0.mlp.up_proj.weight", (8, 8)) is not None
    assert within.form("model.layers.0.mlp.down_proj.weight", (8, 8)) is None
    assert reader.name == "GPTQ, 4 bits in groups of 32"
    assert reader.activation_bits == 16


def test_memory() -> None:
    """Less than eight bytes for each of its codes' are taken, and none to join."""
    num_rows, num_columns = 512, 4096
    tensors = [
        stored(f"{MODULE}.{name}", value)
        for name, value in {
            "qweight": np.zeros((num_columns // 8, num_rows), np.int32),
            "qzeros": np.full((num_columns // 32, num_rows // 8), 0x77777777, np.int32),
            "scales": np.ones((num_columns // 32, num_rows), np.float16),
        }.items()
    ]
    code_bytes = tensors[0].data.nbytes
    tracemalloc.start()
    try:
        (matrix,) = precision(**CONFIG).join(tensors)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        matrix.rows(0, num_rows)  # type: ignore[union-attr]
        assert tracemalloc.get_traced_memory()[1] < 8 * code_bytes
    finally:
        tracemalloc.stop()

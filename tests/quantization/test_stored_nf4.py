"""bitsandbytes checkpoints: against known bytes, the published formula and bitsandbytes itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.quantization.helpers_stored import message_of, only, precision, same_in_parts, stored

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import CodeForm, book

CONFIG: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
}
BYTES: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
MODULE = "model.layers.0.self_attn.q_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)


def blob(**state: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def module(
    codes: NDArray[Any], absmax: NDArray[Any], kind: str = "nf4", **more: Any
) -> dict[str, NDArray[Any]]:
    """Tensors of a module: codes [N, K] and a scale for each 64 of them."""
    flat = codes.reshape(-1).astype(np.uint8)
    numbers = book("nf4") if kind == "nf4" else np.concatenate([FP4, -FP4])
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(codes.shape)}
    return {
        "weight": (flat[0::2] << 4 | flat[1::2]).reshape(-1, 1),
        "weight.absmax": absmax,
        "weight.quant_map": numbers,
        f"weight.quant_state.bitsandbytes__{kind}": blob(**state | more),
    }


def test_known_bytes() -> None:
    """The first of two codes is in the upper half."""
    tensors = module(np.zeros((1, 64), np.uint8), np.array([2.0], np.float32))
    tensors["weight"][:2, 0] = 0x0F, 0x78
    matrix = only(precision(**CONFIG), MODULE, **tensors)
    assert matrix.form == CodeForm("nf4", 64)
    numbers = same_in_parts(matrix)[0]
    assert numbers[:3].tolist() == [-2.0, 2.0, 0.0]
    assert numbers[3] == np.float32(0.07958029955625534) * 2
    assert numbers[4:].tolist() == [-2.0] * 60


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5).map(lambda size: 32 * size)),
    is_nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 2**32),
)
def test_the_formula(shape: tuple[int, int], is_nested: bool, kind: str, seed: int) -> None:
    """Value = book(code) * absmax of its block, where absmax may be such a product as well."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, shape)
    num_blocks = -(-codes.size // 64)
    absmax = random.random(num_blocks, np.float32)
    tensors = module(codes, absmax, kind)
    if is_nested:
        inner = random.integers(0, 256, num_blocks, np.uint8)
        numbers, scales = random.random(256, np.float32), random.random(num_blocks, np.float32)
        more = {"nested_blocksize": 1, "nested_offset": 0.5, "nested_dtype": "float32"}
        tensors = module(codes, inner, kind, **more)
        tensors |= {"weight.nested_quant_map": numbers, "weight.nested_absmax": scales}
        absmax = numbers[inner] * scales + np.float32(0.5)
    matrix = only(precision(**CONFIG | {"bnb_4bit_quant_type": kind}), MODULE, **tensors)
    assert matrix.form.group_size == (64 if shape[1] % 64 == 0 else 32)
    each = np.repeat(absmax, 64)[: codes.size].reshape(shape)
    wanted = tensors["weight.quant_map"][codes] * each
    if kind == "nf4":
        np.testing.assert_array_equal(same_in_parts(matrix), wanted)
    else:  # a twelfth of absmax is rounded
        assert matrix.form.code == "e4m3"
        np.testing.assert_allclose(same_in_parts(matrix), wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(7, 96), (300, 128)])
def test_as_bitsandbytes_has_it(kind: str, is_nested: bool, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    torch.manual_seed(0)
    packed, state = functional.quantize_4bit(
        torch.randn(shape), quant_type=kind, compress_statistics=is_nested, blocksize=64
    )
    tensors = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    reader = precision(**CONFIG | {"bnb_4bit_quant_type": kind})
    matrix = only(reader, MODULE, weight=packed, **tensors)
    # As one row: on a CPU it takes wrong blocks (of 0.50.2) where they run on over the rows.
    state.shape = torch.Size([shape[0] * shape[1]])
    wanted = functional.dequantize_4bit(packed, state).numpy().reshape(shape)
    rounding = 4e-7 if kind == "fp4" else 0  # of a twelfth
    np.testing.assert_allclose(same_in_parts(matrix), wanted, rtol=rounding, atol=0)


def test_bytes_as_bitsandbytes_has_them() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    torch.manual_seed(0)
    codes, largest, _ = functional.int8_vectorwise_quant(torch.randn(9, 40).half())
    wanted = functional.int8_vectorwise_dequant(codes, largest).numpy()
    matrix = only(precision(**BYTES), MODULE, weight=codes, SCB=largest)
    np.testing.assert_allclose(same_in_parts(matrix), wanted, rtol=4e-7, atol=0)


def test_known_rows() -> None:
    tensors = {
        "weight": np.array([[127, -127, 0], [1, -128, 2]], np.int8),
        "SCB": np.array([127.0, 254.0], np.float32),
        "weight_format": np.array(0, np.uint8),
    }
    matrix = only(precision(**BYTES), MODULE, **tensors)
    assert matrix.form == CodeForm("int8", 0)
    assert same_in_parts(matrix).tolist() == [[127.0, -127.0, 0.0], [2.0, -256.0, 4.0]]
    tensors["weight_format"][...] = 1
    with pytest.raises(ModelLoadError, match="layout for one kind of GPU"):
        only(precision(**BYTES), MODULE, **tensors)


def state_of(**change: Any) -> dict[str, Any]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]} | change
    return {STATE: blob(**state)}


NESTED = {
    "weight.absmax": np.ones(2, np.uint8),
    "weight.nested_absmax": np.ones(1, np.float32),
    "weight.nested_quant_map": np.ones(256, np.float32),
} | state_of(nested_blocksize=256, nested_offset=0.0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight": None}, f"`{MODULE}.weight` is missing"),
        ({"weight.absmax": None}, f"`{MODULE}.weight.absmax` is missing"),
        ({"weight.quant_map": None}, f"`{MODULE}.weight.quant_map` is missing"),
        ({STATE: None}, "whose `.weight.quant_state.bitsandbytes__nf4` or"),
        ({"weight": np.ones((64, 2), np.uint8)}, "has shape [64, 2], not [64, 1]"),
        ({"weight": np.ones((64, 1), np.int8)}, "is of type I8, not U8"),
        ({"weight.absmax": np.ones(3, np.float32)}, "has shape [3], not [2]"),
        ({"weight.absmax": np.ones(2, np.uint8)}, "is of type U8, not F32"),
        ({"weight.quant_map": np.ones(16, np.float32)}, "is not the book of nf4"),
        ({STATE: np.frombuffer(b"{", np.uint8)}, "is not JSON"),
        ({STATE: np.frombuffer(b"[" * 60000, np.uint8)}, "is not JSON"),
        ({STATE: np.frombuffer(b"\xff", np.uint8)}, "is not JSON"),
        ({STATE: np.frombuffer(b"[]", np.uint8)}, "is not a JSON object"),
        ({STATE: np.full(65537, 32, np.uint8)}, "has more than `65536` bytes"),
        (state_of(shape=[2]), "has no `shape` of two sizes"),
        (state_of(shape=[2, -64]), "has no `shape` of two sizes"),
        (state_of(shape=[2, 1e9]), "has no `shape` of two sizes"),
        (state_of(shape=[2, 40]), "has rows of `40` numbers"),
        (state_of(shape=[4, 64]), "has shape [64, 1], not [128, 1]"),
        (state_of(blocksize=128), "a `blocksize` other than `64`"),
        (state_of(quant_type="fp4"), "a `quant_type` other than `nf4`"),
        (NESTED | state_of(), "has no `nested_blocksize`"),
        (NESTED | state_of(nested_blocksize=1), "has no `nested_offset`"),
        (NESTED | state_of(nested_blocksize=1, nested_offset=1e40), "has no `nested_offset`"),
        (NESTED | {"weight.nested_quant_map": None}, "nested_quant_map` is missing"),
        (NESTED | {"weight.nested_absmax": np.ones(2, np.float32)}, "has shape [2], not [1]"),
    ],
)
def test_damaged(change: dict[str, Any], problem: str) -> None:
    whole = module(np.zeros((2, 64), np.uint8), np.ones(2, np.float32)) | change
    with pytest.raises(ModelLoadError) as caught:
        only(precision(**CONFIG), MODULE, **{k: v for k, v in whole.items() if v is not None})
    assert problem in message_of(caught.value)
    assert MODULE in caught.value.message


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("load_in_4bit", {"load_in_4bit": False}),
        ("load_in_4bit", {"load_in_8bit": True}),
        ("bnb_4bit_quant_type", {"bnb_4bit_quant_type": "int4"}),
        ("bnb_4bit_quant_storage", {"bnb_4bit_quant_storage": "bfloat16"}),
        ("llm_int8_skip_modules", {"llm_int8_skip_modules": "lm_head"}),
    ],
)
def test_refused(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        precision(**CONFIG | change)
    assert f"quantization_config.{key}" in message_of(caught.value)


def test_which_modules() -> None:
    reader = precision(**CONFIG | {"quant_method": None})  # as configs of 2023
    assert reader.form("model.layers.0.mlp.up_proj.weight", (8, 128)) == CodeForm("nf4", 64)
    assert reader.form("model.layers.0.mlp.up_proj.weight", (8, 48)) == CodeForm("nf4", 16)
    for name in ("lm_head", "model.embed_tokens"):
        assert reader.form(f"{name}.weight", (8, 128)) is None
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight` has rows of `40` numbers"):
        reader.form("model.layers.0.mlp.up_proj.weight", (8, 40))
    listed = precision(**BYTES, llm_int8_skip_modules=["q_proj", "model.layers.1"])
    for name in ("model.layers.0.q_proj", "model.layers.1.k_proj"):
        assert listed.form(f"{name}.weight", (8, 8)) is None
    assert listed.form("model.layers.11.k_proj.weight", (8, 8)) == CodeForm("int8", 0)
    plain = stored("lm_head.weight", np.ones((2, 2), np.float32))
    assert listed.join([plain]) == [plain]

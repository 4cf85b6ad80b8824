"""Whatever tensors a file holds under the names of a format: they are read, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantization.helpers_stored import message_of, precision

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.layers.toolkit import StoredTensor
from penstock.quantization.codes import CodedTensor
from penstock.quantization.stored import precision_of

INTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}


def compressed(weights: dict[str, Any], stored_as: str) -> dict[str, Any]:
    groups = {"a": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": groups}


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "gptq 8": {"quant_method": "gptq", "bits": 8, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "packed": compressed(INTS, "pack-quantized"),
    "bytes": compressed(INTS | {"strategy": "channel", "group_size": None}, "int-quantized"),
    "fp8": {"quant_method": "fp8", "weight_block_size": [2, 16]},
    "fp8 matrices": {"quant_method": "fp8"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "mxfp4": {"quant_method": "mxfp4"},
}
PIECES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq 8": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "bytes": ("weight", "weight_scale", "weight_zero_point"),
    "fp8": ("weight", "weight_scale_inv"),
    "fp8 matrices": ("weight", "weight_scale", "input_scale"),
    "nf4": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "int8": ("weight", "SCB", "weight_format"),
    "mxfp4": ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj"),
}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1}
# What each piece is in a file that is whole, mostly: so that what is drawn often comes close.
LIKELY = {
    "qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32", "weight_packed": "I32",
    "weight_zero_point": "I32", "weight_shape": "I64", "SCB": "F32", "weight_scale": "F32",
    "weight_scale_inv": "F32", "down_proj": "BF16", "gate_up_proj_bias": "BF16",
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tensors(kind: str, data: st.DataObject) -> None:
    sizes = st.sampled_from([1, 2, 4, 8, 16, 32, 0, 3])
    tensors = []
    for piece in PIECES[kind]:
        if not data.draw(st.integers(0, 9)):
            continue
        weight = {"fp8": "F8_E4M3", "fp8 matrices": "F8_E4M3", "nf4": "U8"}.get(kind, "I8")
        likely = LIKELY | {"weight": weight}
        dtypes = [likely.get(piece, "U8")] * 12 + [*ITEM_BYTES]
        dtype = data.draw(st.sampled_from(dtypes))
        shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=4)))
        num_bytes = int(np.prod(shape)) * ITEM_BYTES[dtype]
        octets = data.draw(st.binary(min_size=1, max_size=16))
        body = np.frombuffer((octets * (num_bytes // len(octets) + 1))[:num_bytes], np.uint8)
        tensors.append(StoredTensor(f"model.layers.0.experts.{piece}", dtype, shape, body))
    try:
        for part in precision(**CONFIGS[kind]).join(tensors):
            if isinstance(part, CodedTensor):
                rows = part.rows(0, part.shape[0])
                assert rows.codes.shape == part.shape
                with np.errstate(all="ignore"):
                    assert part.values().shape == part.shape
            else:
                assert part.data.ndim == 1
    except ModelLoadError as error:
        message_of(error)


HUGE = 2**50


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("mxfp4", {"gate_up_proj_blocks": (HUGE, 2, 0, 16), "gate_up_proj_scales": (HUGE, 2, 0)}),
        ("mxfp4", {"down_proj": (HUGE, 0, HUGE)}),
        ("gptq", {"qweight": (HUGE, 0), "qzeros": (HUGE, 0), "scales": (HUGE // 4, 0)}),
        ("awq", {"qweight": (HUGE, 0), "qzeros": (HUGE // 32, 0), "scales": (HUGE // 32, 0)}),
        ("fp8", {"weight": (0, HUGE), "weight_scale_inv": (0, HUGE // 16)}),
        ("packed", {"weight_packed": (HUGE, 0), "weight_scale": (HUGE, 0), "weight_shape": (2,)}),
        ("int8", {"weight": (0, HUGE), "SCB": (0,)}),
    ],
)
def test_sizes_without_bytes(kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """A tensor that has no bytes may claim any size."""
    dtypes = LIKELY | {"weight": "F8_E4M3" if kind == "fp8" else "I8"}
    tensors = [
        StoredTensor(f"m.experts.{name}", dtypes.get(name, "U8"), shape, np.zeros(0, np.uint8))
        for name, shape in shapes.items()
    ]
    with pytest.raises(ModelLoadError, match="is empty"):
        precision(**CONFIGS[kind]).join(tensors)


def test_too_many_experts() -> None:
    blocks, scales = (5000, 2, 1, 16), (5000, 2, 1)
    for name, shape, others in (
        ("down_proj_blocks", blocks, [("down_proj_scales", scales)]),
        ("down_proj", scales, []),
    ):
        dtype = "U8" if others else "F16"
        tensors = [
            StoredTensor(f"m.experts.{part}", dtype, size, np.zeros(octets, np.uint8))
            for part, size in [(name, shape), *others]
            if (octets := int(np.prod(size)) * ITEM_BYTES[dtype])
        ]
        with pytest.raises(ModelLoadError, match="`5000` experts"):
            precision(quant_method="mxfp4").join(tensors)


def test_names_of_strangers() -> None:
    """Names that are long, of many parts or unprintable are told in part, and at once."""
    reader = precision(**CONFIGS["gptq"], modules_to_not_convert=["a.b", ".*x"])
    for name in ("a." * 500_000 + "0", "\n\ud800`" * 1000):
        tensor = StoredTensor(f"{name}.qweight", "I32", (4, 8), np.zeros(128, np.uint8))
        with pytest.raises(ModelLoadError) as caught:
            reader.join([tensor])
        message_of(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_config(kind: str, data: st.DataObject) -> None:
    """One key of a config has any value: it is used, or refused by name."""
    given: dict[str, Any] = {**CONFIGS[kind]}
    keys = [*given, "modules_to_not_convert", "ignore", "dynamic", "lm_head", "ignored_layers"]
    key = data.draw(st.sampled_from(keys))
    value = data.draw(JSON)
    if key == "config_groups" and data.draw(st.booleans()):
        group = given[key]["a"]
        inner = data.draw(st.sampled_from([*group, "format", "input_activations"]))
        value = {"a\n\ud800": group | {inner: value}}
    given[key] = value
    try:
        reader = precision_of({"quantization_config": given})
        assert reader is not None
        reader.form("model.layers.0.mlp.up_proj.weight", (32, 64))
        assert reader.name
        assert reader.activation_bits in {8, 16}
    except UnsupportedModel as error:
        if "quantization_config" not in message_of(error):
            raise

"""compressed-tensors checkpoints: what its own compressors write, as they decompress it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantization.helpers_stored import message_of, only, precision, same_in_parts, stored

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.quantization.codes import CodeForm

MODULE = "model.layers.0.self_attn.q_proj"
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOATS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def config(
    weights: dict[str, Any],
    stored_as: str = "pack-quantized",
    inputs: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | more


def quantized(
    weight: torch.Tensor, weights: dict[str, Any], stored_as: str, inputs: dict[str, Any] | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the library stores for a weight, and what it reads back, in float32."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    args = scheme.weights
    assert args is not None
    rows, columns = weight.shape
    match args.strategy:
        case "tensor":
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            parts = weight.unflatten(1, (-1, args.group_size))
            low, high = parts.amin(2), parts.amax(2)
        case _:
            height, width = args.block_structure
            padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
            padded[:rows, :columns] = weight
            parts = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
    scale, zero = calculate_qparams(low, high, args)
    scale = scale.to(torch.bfloat16)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(stored_as)
    files = compressor.compress(state, scheme)
    exact = files | {"weight_scale": scale.float()}  # decompression rounds to the scales' type
    return files, compressor.decompress(exact, scheme)["weight"]


def read(weights: dict[str, Any], stored_as: str, inputs: Any, shape: tuple[int, int]) -> CodeForm:
    """Compress, compare, and tell the form."""
    torch.manual_seed(shape[0] * 1000 + shape[1])
    files, wanted = quantized(torch.randn(shape), weights, stored_as, inputs)
    matrix = only(precision(**config(weights, stored_as, inputs)), MODULE, **files)
    assert matrix.shape == shape
    np.testing.assert_array_equal(same_in_parts(matrix), wanted.float().numpy())
    return matrix.form


@settings(max_examples=40, deadline=None)
@given(
    # From 9 rows: the library cannot read back zeros that it has packed into one row of words.
    shape=st.tuples(st.integers(9, 40), st.integers(1, 5).map(lambda size: 32 * size)),
    bits=st.sampled_from([4, 8]),
    is_symmetric=st.booleans(),
    is_grouped=st.booleans(),
    stored_as=st.sampled_from(["pack-quantized", "int-quantized", "naive-quantized"]),
)
def test_integers(
    shape: tuple[int, int], bits: int, is_symmetric: bool, is_grouped: bool, stored_as: str
) -> None:
    weights = (GROUPS if is_grouped else CHANNELS) | {"num_bits": bits, "symmetric": is_symmetric}
    form = read(weights, stored_as, None, shape)
    code = f"{'' if is_symmetric else 'u'}int{bits}"
    assert form == CodeForm(code, 32 * is_grouped, has_minima=not is_symmetric)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [1, 7, 33])
def test_columns_that_do_not_fill_a_word(columns: int) -> None:
    for bits in (4, 8):
        for is_symmetric in (True, False):
            weights = CHANNELS | {"num_bits": bits, "symmetric": is_symmetric}
            read(weights, "pack-quantized", None, (9, columns))


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_one_scale_for_all_integers(is_symmetric: bool) -> None:
    weights = CHANNELS | {"strategy": "tensor", "symmetric": is_symmetric}
    read(weights, "int-quantized", TOKENS, (9, 17))
    read(weights, "pack-quantized", None, (9, 17))


@pytest.mark.parametrize(
    "weights",
    [
        FLOATS,
        FLOATS | {"strategy": "channel"},
        FLOATS | {"strategy": "group", "group_size": 32},
        FLOATS | {"strategy": "block", "block_structure": [16, 32]},
        FLOATS | {"strategy": "block", "block_structure": [128, 128]},
    ],
)
@pytest.mark.parametrize("stored_as", ["float-quantized", "naive-quantized"])
def test_floats(weights: dict[str, Any], stored_as: str) -> None:
    form = read(weights, stored_as, None, (40, 96))
    assert form.code == "e4m3"
    assert form.group_size == {"group": 32, "block": weights.get("block_structure", [0, 0])[1]}.get(
        weights["strategy"], 0
    )


def test_known_bytes() -> None:
    """Eight codes in a word, the first lowest, counted from -8; zeros packed along the rows."""
    packed = torch.tensor([[0x76543210], [-0x01234568]], dtype=torch.int32)  # 0xFEDCBA98
    files = {
        "weight_packed": packed,
        "weight_scale": torch.tensor([[0.5], [2.0]]),
        "weight_shape": torch.tensor([2, 8]),
    }
    weights = CHANNELS | {"num_bits": 4}
    numbers = only(precision(**config(weights)), MODULE, **files).values()
    assert numbers.tolist() == [
        [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5],
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0],
    ]
    files["weight_zero_point"] = torch.tensor([[0x91]], dtype=torch.int32)  # -7 and 1
    reader = precision(**config(weights | {"symmetric": False}))
    numbers = only(reader, MODULE, **files).values()
    assert numbers.tolist() == [
        [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
        [-2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0],
    ]


def test_activations() -> None:
    def told(weights: dict[str, Any], stored_as: str, inputs: Any) -> tuple[int, str]:
        reader = precision(**config(weights, stored_as, inputs))
        return reader.activation_bits, reader.name

    assert told(CHANNELS, "int-quantized", TOKENS) == (
        8,
        "compressed-tensors, integers of 8 bits, a scale a row, activations in 8 bits",
    )
    assert told(CHANNELS, "int-quantized", TOKENS | {"dynamic": False})[0] == 16
    assert told(CHANNELS, "int-quantized", TOKENS | {"symmetric": False})[0] == 16
    assert told(GROUPS, "pack-quantized", None)[0] == 16
    few_bits = told(CHANNELS | {"num_bits": 4}, "int-quantized", TOKENS)
    assert few_bits[0] == 16, "codes of 4 bits are multiplied with 16"
    assert "in 16 bits" in few_bits[1]
    assert told(FLOATS, "float-quantized", TOKENS | {"type": "float"}) == (
        16,
        "compressed-tensors, fp8, a scale each, activations in 16 bits",
    )


def test_scales_of_activations_are_dropped() -> None:
    files, _ = quantized(torch.randn(4, 8), FLOATS, "float-quantized", None)
    tensors = [stored(f"{MODULE}.{name}", value) for name, value in files.items()]
    tensors.append(stored(f"{MODULE}.input_scale", torch.ones(1)))
    found = precision(**config(FLOATS, "float-quantized")).join(tensors)
    assert [part.name for part in found] == [f"{MODULE}.weight"]


class Block(torch.nn.Module):
    """Some modules of a model, of the kinds and names that targets mean."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(32, 32)
        self.model.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(3)])
        for layer in self.model.layers:
            for name in ("q_proj", "k_proj", "up_proj", "down_proj"):
                setattr(layer, name, torch.nn.Linear(32, 32))
        self.lm_head = torch.nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ({"a": ["Linear"]}, ["lm_head"]),
        ({"a": ["Linear"]}, ["re:.*lm_head", "model.layers.1.k_proj"]),
        ({"a": ["Linear", "Embedding"]}, []),
        ({"a": ["Linear"], "b": ["re:.*down_proj$"]}, ["lm_head"]),
        ({"a": ["re:.*_proj$"], "b": ["model.layers.0.q_proj"]}, []),
        ({"a": [r"re:model\.layers\.[02]\.(q|k)_proj"], "b": ["re:.*up.*"]}, ["re:.*2.*"]),
        ({"a": ["re:.*proj"], "b": ["re:.*.down_proj"]}, []),
        ({"a": ["Embedding"], "b": ["re:lm_hea"]}, []),
        ({"a": ["Linear"]}, ["Linear"]),
        ({"a": ["LlamaMLP", "q_proj"], "b": ["lm_head"]}, []),
    ],
)
def test_which_modules(targets: dict[str, list[str]], ignore: list[str]) -> None:
    """Those that the library itself gives a scheme to, and the same one."""
    groups = {
        name: {"targets": wanted, "weights": GROUPS if name == "a" else CHANNELS}
        for name, wanted in targets.items()
    }
    given = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ignore,
        "quantization_status": "compressed",
    }
    reader = precision(**given)
    model = Block()
    apply_quantization_config(model, QuantizationConfig.model_validate(given))
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        scheme = getattr(module, "quantization_scheme", None)
        form = reader.form(f"{name}.weight", (32, 32))
        assert (form and form.bits) == (scheme and scheme.weights.num_bits), name


def test_a_format_for_each_group() -> None:
    floats = {"targets": ["re:.*down_proj"], "weights": FLOATS, "format": "float-quantized"}
    packed = {"targets": ["Linear"], "weights": GROUPS, "format": "pack-quantized"}
    groups = {"a": packed, "b": floats}
    reader = precision(**config(GROUPS, "mixed-precision", config_groups=groups))
    assert reader.form("model.layers.0.mlp.down_proj.weight", (32, 32)) == CodeForm("e4m3", 0)
    assert reader.form("model.layers.0.mlp.up_proj.weight", (32, 32)) == CodeForm("int4", 32)
    assert reader.form("model.layers.0.mlp.gate.weight", (32, 32)) is None
    assert reader.form("lm_head.weight", (32, 32)) is None
    with pytest.raises(UnsupportedModel, match=r"quantization_config\.format"):
        precision(**config(GROUPS, "mixed-precision"))


def test_a_router_that_is_coded_after_all() -> None:
    files, _ = quantized(torch.randn(4, 32), GROUPS, "pack-quantized", None)
    tensors = [stored(f"model.layers.0.mlp.gate.{name}", value) for name, value in files.items()]
    (found,) = precision(**config(GROUPS)).join(tensors)
    assert found.name == "model.layers.0.mlp.gate.weight"


def test_the_old_key() -> None:
    from penstock.quantization.stored import precision_of

    found = precision_of({"compression_config": config(GROUPS) | {"quant_method": None}})
    assert found is not None
    assert found.name.startswith("compressed-tensors, integers of 4 bits, groups of 32")


BARE = {"weights": GROUPS}


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("kv_cache_scheme", config(GROUPS, kv_cache_scheme=FLOATS)),
        ("transform_config", config(GROUPS, transform_config={"config_groups": {"a": 1}})),
        ("sparsity_config.format", config(GROUPS, sparsity_config={"format": "sparse-bitmask"})),
        ("format", config(GROUPS, "nvfp4-pack-quantized")),
        ("format", config(GROUPS, "marlin-24")),
        ("format", config(FLOATS, "pack-quantized")),
        ("config_groups", config(GROUPS, config_groups={})),
        ("config_groups", config(GROUPS, config_groups=None)),
        ("config_groups", config(GROUPS, config_groups={"a": {"targets": []} | BARE})),
        ("config_groups.W4A16", config(GROUPS, config_groups={"W4A16": ["Linear"]})),
        ("config_groups.a.targets", config(GROUPS, config_groups={"a": {"targets": "a"} | BARE})),
        ("ignore", config(GROUPS, ignore="lm_head")),
        ("ignore", config(GROUPS, ignore=["re:(?!a)"])),
        ("ignore", config(GROUPS, ignore=["re:(a"])),
    ],
)  # fmt: skip
def test_refused(key: str, given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        precision(**given)
    assert f"quantization_config.{key}" in message_of(caught.value)


INT, FLOAT = (GROUPS, "pack-quantized"), (FLOATS, "float-quantized")
BLOCK = {"strategy": "block", "block_structure": [8, 32]}


@pytest.mark.parametrize(
    ("key", "weights", "change"),
    [
        ("num_bits", INT, {"num_bits": 3}),
        ("num_bits", FLOAT, {"num_bits": 4}),
        ("type", INT, {"type": "nf"}),
        ("actorder", INT, {"actorder": "group"}),
        ("group_size", INT, {"group_size": 24}),
        ("group_size", INT, {"group_size": -1}),
        ("group_size", INT, {"group_size": None}),
        ("strategy", INT, {"strategy": "tensor_group"}),
        ("strategy", INT, BLOCK),
        ("block_structure", FLOAT, {"strategy": "block"}),
        ("block_structure", FLOAT, BLOCK | {"block_structure": "2x3x4"}),
        ("symmetric", FLOAT, {"symmetric": False}),
        ("dynamic", INT, {"dynamic": True}),
    ],
)
def test_refused_weights(
    key: str, weights: tuple[dict[str, Any], str], change: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        precision(**config(weights[0] | change, weights[1]))
    message = message_of(caught.value)
    assert f"quantization_config.config_groups.group_0.weights.{key}" in message


def files_of(weights: dict[str, Any], stored_as: str) -> dict[str, torch.Tensor]:
    return quantized(torch.randn(16, 64), weights, stored_as, None)[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight_scale": None}, "whose `.weight_scale` is missing"),
        ({"weight_packed": None}, f"`{MODULE}.weight_packed` is missing"),
        ({"weight_shape": None}, f"`{MODULE}.weight_shape` is missing"),
        ({"weight_zero_point": None}, f"`{MODULE}.weight_zero_point` is missing"),
        ({"weight_shape": torch.tensor([16, 65])}, "not that of [16, 65] numbers of 4 bits"),
        ({"weight_shape": torch.tensor([17, 64])}, "not that of [17, 64] numbers of 4 bits"),
        ({"weight_shape": torch.tensor([16, -64])}, "not that of [16, -64] numbers of 4 bits"),
        ({"weight_shape": torch.tensor([8])}, "has shape [1], not [2]"),
        ({"weight_scale": torch.ones(16, 3)}, "has shape [16, 3], not [16, 2]"),
        ({"weight_zero_point": torch.ones(16, 2).int()}, "has shape [16, 2], not [2, 2]"),
        ({"weight_zero_point": torch.ones(2, 2).char()}, "is of type I8, not I32"),
        ({"weight_packed": torch.ones(16, 8)}, "is of type F32, not I32"),
        ({"weight_g_idx": torch.ones(64).int()}, "`actorder` that is not implemented"),
        ({"weight_global_scale": torch.ones(1)}, "`strategy` that is not implemented"),
    ],
)
def test_damaged(change: dict[str, Any], problem: str) -> None:
    weights = GROUPS | {"symmetric": False}
    tensors = files_of(weights, "pack-quantized") | change
    with pytest.raises(ModelLoadError) as caught:
        only(
            precision(**config(weights)),
            MODULE,
            **{name: value for name, value in tensors.items() if value is not None},
        )
    assert problem in message_of(caught.value)


def test_damaged_bytes() -> None:
    weights = CHANNELS | {"num_bits": 4, "symmetric": False}
    reader = precision(**config(weights, "int-quantized"))
    files = files_of(weights, "int-quantized")
    with pytest.raises(ModelLoadError, match="unlike its scales"):
        only(reader, MODULE, **files | {"weight_zero_point": torch.ones(3).char()})
    matrix = only(reader, MODULE, **files | {"weight": torch.full((16, 64), 8).char()})
    with pytest.raises(ModelLoadError, match="more than 4 bits"):
        matrix.rows(0, 1)
    symmetric = precision(**config(CHANNELS, "int-quantized"))
    files = files_of(CHANNELS, "int-quantized")
    only(symmetric, MODULE, **files | {"weight_zero_point": torch.zeros(16, 1).char()})
    with pytest.raises(ModelLoadError, match="says `symmetric`"):
        only(symmetric, MODULE, **files | {"weight_zero_point": torch.ones(16, 1).char()})


def test_a_plain_module_that_is_coded() -> None:
    files = files_of(GROUPS, "pack-quantized")
    tensors = [stored(f"lm_head.{name}", value) for name, value in files.items()]
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight_scale.*leaves plain"):
        precision(**config(GROUPS)).join(tensors)

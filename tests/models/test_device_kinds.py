"""Every kind of model that a GPU is to compute: device leaves give what the torch leaves give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.device_helpers import DeviceSessions, Threads
from tests.models.helpers import MAX_BLOCK_SIZE, NUM_BLOCKS, Sessions
from tests.models.kinds import KINDS, MLP, attention, fill, model

from penstock.attention.kv_store import KVStore
from penstock.attention.paged import choose
from penstock.attention.pages import KVPages
from penstock.attention.reference import ReferenceAttention
from penstock.errors import ConfigError
from penstock.kernels.gpu import device
from penstock.kernels.op import forced
from penstock.layers import shards
from penstock.layers.device_materials import DeviceMaterials
from penstock.layers.device_toolkit import DeviceToolkit
from penstock.layers.materials import Materials
from penstock.layers.torch_toolkit import TorchToolkit
from penstock.models.compose import compose
from penstock.models.device_model import DeviceModel, Share, check_attention
from penstock.models.device_shapes import why_not_on_device, why_not_shared
from penstock.models.spec import LayerSpec, ModelSpec
from penstock.models.torch_model import TorchModel
from penstock.parallel.group import Alone, Group
from penstock.quantization.schemes import scheme

pytestmark = pytest.mark.usefixtures("references")

SINKS = model(
    LayerSpec(attention=attention(has_sinks=True, window=7, has_bias=True), mlp=MLP),
    LayerSpec(attention=attention(has_sinks=True, softcap=2.0), mlp=replace(MLP, size=24)),
    LayerSpec(attention=attention(rope=None), mlp=replace(MLP, activation="relu_squared")),
    has_head_bias=True,
    residual_scale=0.7,
)
TAKEN = {name: spec for name, spec in KINDS.items() if why_not_on_device(spec) is None} | {
    "sinks": SINKS
}
LEN = 37
IDS = np.random.default_rng(1).integers(0, 67, (2, LEN)).tolist()


def on_torch(spec: ModelSpec) -> TorchModel:
    with torch.inference_mode():
        decoder = compose(spec, TorchToolkit(Materials(torch.float32)))
        fill(decoder)
    kv = KVStore(spec.num_layers, NUM_BLOCKS * MAX_BLOCK_SIZE, *spec.cached, torch.float32)
    return TorchModel(decoder, kv, ReferenceAttention())


def on_device(spec: ModelSpec, dtype: str = "float32", group: Group | None = None) -> DeviceModel:
    group = group or Alone()
    heads = shards.heads(spec.num_heads, spec.num_kv_heads, group.size)
    paged = choose("triton", Share(*heads, spec.head_dim), dtype, 3, device())
    materials = DeviceMaterials(getattr(torch, dtype), device(), group, scheme("none", dtype))
    with torch.inference_mode():
        decoder = compose(spec, DeviceToolkit(materials))
        fill(decoder)
    kv = KVPages(spec.num_layers, NUM_BLOCKS, 3, heads.num_kv_heads, spec.head_dim, dtype, device())
    return DeviceModel(decoder, materials, kv, paged)


def ways(sessions: Sessions) -> list[torch.Tensor]:
    """Whole, in chunks beside a row that decodes, token by token."""
    first, second = IDS
    found = [sessions.step({"a": first})["a"], sessions.step({"b": second[:20]})["b"]]
    for start, stop in ((20, 21), (21, 30), (30, LEN)):
        both = sessions.step({"b": second[start:stop], f"c{start}": first[:1]})
        found += [both["b"], both[f"c{start}"]]
    return [*found, *(sessions.step({"d": [token]})["d"] for token in second[:12])]


def far(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", TAKEN)
def test_it_computes_what_torch_computes(name: str) -> None:
    expected = ways(Sessions(on_torch(TAKEN[name]), block_size=3))
    found = ways(DeviceSessions(on_device(TAKEN[name])))
    assert far(found, expected) < 1e-4
    assert float(expected[0].std()) > 0.1


@pytest.mark.parametrize("name", TAKEN)
def test_ranks_compute_it_too(name: str) -> None:
    spec = TAKEN[name]
    if why_not_shared(spec, 2) is not None:
        assert name == "olmo2"
        return
    expected = ways(Sessions(on_torch(spec), block_size=3))

    def of_rank(group: Group) -> list[torch.Tensor]:
        return ways(DeviceSessions(on_device(spec, group=group)))

    for found in Threads(2).run(of_rank):
        assert far(found, expected) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TAKEN)
def test_narrow_numbers_are_near(name: str, dtype: str) -> None:
    exact = ways(Sessions(on_torch(TAKEN[name]), block_size=3))
    found = ways(DeviceSessions(on_device(TAKEN[name], dtype)))
    errors = torch.cat([one - other for one, other in zip(found, exact, strict=True)])
    share = float(errors.square().mean().sqrt() / torch.cat(exact).std())
    assert 1e-5 < share < {"bfloat16": 0.05, "float16": 0.01}[dtype], share


@pytest.mark.skipif(device().type == "cuda", reason="there the tests above use the kernels")
@pytest.mark.parametrize("name", ["sinks", "gemma2", "neox", "cohere"])
def test_interpreted_kernels_give_what_references_give(name: str) -> None:
    found = []
    for mode in ("triton", "reference"):
        with forced(mode):
            sessions = DeviceSessions(on_device(TAKEN[name]))
            steps = [sessions.step({"a": IDS[0][:11], "b": IDS[1][:1]})]
            steps.append(sessions.step({"b": IDS[1][1:2], "a": IDS[0][11:12]}))
            found.append([logits for step in steps for logits in step.values()])
    assert far(*found) < 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("deepseek_v2", "latent attention"),
        ("deepseek_v3", "latent attention"),
        ("bert", "encoder"),
    ],
)
def test_what_has_no_kernel_is_refused_with_its_reason(name: str, reason: str) -> None:
    assert reason in (why_not_on_device(KINDS[name]) or "")
    assert set(KINDS) - set(TAKEN) == {
        "mixtral",
        "qwen2_moe",
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
        "bert",
    }


def test_heads_that_differ_are_refused() -> None:
    """Pages have one shape."""
    spec = model(
        LayerSpec(attention=attention(), mlp=MLP),
        LayerSpec(attention=attention(num_kv_heads=4), mlp=MLP),
    )
    assert "different numbers" in (why_not_on_device(spec) or "")


def test_sizes_that_differ_are_shared_by_what_divides_them_all() -> None:
    assert why_not_shared(SINKS, 2) is None  # 40 and 24
    odd = replace(SINKS.layers[1], mlp=replace(MLP, size=25))
    assert "25" not in (why_not_shared(SINKS, 4) or "")
    assert why_not_shared(replace(SINKS, layers=(SINKS.layers[0], odd)), 2) is not None


def test_flashinfer_is_told_of_sinks_before_anything_is_loaded() -> None:
    check_attention(SINKS, "triton")
    check_attention(KINDS["gemma2"], "flashinfer")
    with pytest.raises(ConfigError, match="sinks"):
        check_attention(SINKS, "flashinfer")

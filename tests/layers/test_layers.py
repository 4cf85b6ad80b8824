"""Layers against their definitions in fp64, and what they tell the loader."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from penstock.layers.linear import Linear, packs, product
from penstock.layers.materials import Materials
from penstock.layers.norm import Norm
from penstock.layers.rotary import Rotary
from penstock.layers.scaling import LinearScaling, Llama3Scaling, RopeScaling, frequencies
from penstock.layers.specs import NormSpec, RopeSpec
from penstock.layers.toolkit import Layer, Part, StoredTensor
from penstock.layers.torch_toolkit import TorchToolkit

FP32 = Materials(torch.float32)
BF16 = Materials(torch.bfloat16)


def batch_of(**tensors: torch.Tensor) -> Any:
    """As much of a `TorchBatch` as a leaf reads."""
    return SimpleNamespace(shared={}, **tensors)


def stored(name: str, values: torch.Tensor) -> StoredTensor:
    """fp32 values as a checkpoint has them."""
    data = values.float().contiguous().numpy().reshape(-1).view(np.uint8)
    return StoredTensor(name, "F32", tuple(values.shape), data)


def rotary_of(num_heads: int, head_dim: int, spec: RopeSpec) -> Rotary:
    return Rotary(spec, FP32, first=0, num_heads=num_heads, head_dim=head_dim, offset=0)


def load(layer: Layer) -> dict[str, torch.Tensor]:
    """Load random numbers, as far as the layer's format has them; them in fp64, by name."""
    given = {}
    for weight in layer.weights():
        values = torch.randn(weight.shape).bfloat16()
        weight.load(stored(weight.name, values))
        given[weight.name] = values.double()
    return given


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_rms_norm_is_its_definition(size: int, eps: float) -> None:
    torch.manual_seed(size)
    norm = Norm("norm", size, NormSpec(eps=eps), FP32)
    (scale,) = load(norm).values()
    norm.finish()
    x = torch.randn(5, size) * torch.tensor([1e-8, 1e-3, 1.0, 1e3, 1e8])[:, None]
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * scale
    torch.testing.assert_close(norm(x).double(), expected, rtol=3e-6, atol=1e-12)
    zero = torch.zeros(1, size)
    assert torch.equal(norm(zero), zero)


def test_rms_norm_adds_to_the_residual_in_place() -> None:
    norm = Norm("norm", 8, NormSpec(eps=1e-5), FP32)
    norm.finish()
    residual, x = torch.randn(3, 8), torch.randn(3, 8)
    total = residual + x
    torch.testing.assert_close(norm.add(residual, x), norm(total))
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(norm.add(residual, None), norm(total))
    torch.testing.assert_close(residual, total)


def test_rms_norm_of_bf16_sums_in_fp32() -> None:
    norm = Norm("norm", 4096, NormSpec(eps=1e-6), BF16)
    norm.finish()
    # In bf16 a sum of squares of ones would stop growing at 256.
    y = norm(torch.ones(1, 4096, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ones_like(y))


def _llama3_frequency(frequency: float, scaling: Llama3Scaling) -> float:
    """Written as in the report: three cases."""
    wave_len = 2 * math.pi / frequency
    if wave_len < scaling.original_context_len / scaling.high_freq_factor:
        return frequency
    if wave_len > scaling.original_context_len / scaling.low_freq_factor:
        return frequency / scaling.factor
    share = scaling.original_context_len / wave_len - scaling.low_freq_factor
    share /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - share) * frequency / scaling.factor + share * frequency


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(3.0),
        Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_len=64
        ),
    ],
)
def test_rotary_turns_pairs_by_their_angle(scaling: RopeScaling | None) -> None:
    head_dim, theta = 16, 1000.0
    rotary = rotary_of(3, head_dim, RopeSpec(dim=head_dim, theta=theta, scaling=scaling))
    positions = torch.tensor([0, 1, 5, 250])
    x = torch.randn(4, 5, head_dim)
    qkv = x.reshape(4, -1).clone()
    y = rotary(qkv, batch_of(positions=positions)).view(4, 5, head_dim)
    assert torch.equal(y[:, 3:], x[:, 3:])  # values have no position
    x, y = x[:, :3], y[:, :3]
    for t, position in enumerate(positions.tolist()):
        for i in range(head_dim // 2):
            frequency = theta ** (-2 * i / head_dim)
            if isinstance(scaling, LinearScaling):
                frequency /= scaling.factor
            elif isinstance(scaling, Llama3Scaling):
                frequency = _llama3_frequency(frequency, scaling)
            a, b = x[t, :, i], x[t, :, i + head_dim // 2]
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            torch.testing.assert_close(y[t, :, i], a * cos - b * sin, rtol=0, atol=1e-4)
            turned = y[t, :, i + head_dim // 2]
            torch.testing.assert_close(turned, b * cos + a * sin, rtol=0, atol=1e-4)


def test_angles_are_computed_once_a_step() -> None:
    """All layers share them through the batch, and another rotary has its own."""
    batch = batch_of(positions=torch.tensor([3]))
    rotary, other = (rotary_of(1, 8, RopeSpec(dim=8, theta=theta)) for theta in (100.0, 200.0))
    x = torch.randn(1, 8)
    first = rotary(x.clone(), batch).clone()
    batch.positions = None  # nobody looks again
    assert torch.equal(rotary(x.clone(), batch), first)
    batch.positions = torch.tensor([3])
    assert not torch.equal(other(x.clone(), batch), first)


@pytest.mark.parametrize("head_dim", [6, 64, 80, 128])
@pytest.mark.parametrize("theta", [100.0, 1e4, 5e5])
def test_frequencies_are_those_of_transformers(head_dim: int, theta: float) -> None:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    torch.testing.assert_close(
        torch.from_numpy(frequencies(head_dim, theta, None)),
        1.0 / theta**exponents,
        rtol=1.2e-7,  # one unit in the last place
        atol=0,
    )


def test_llama3_scaling_has_all_three_cases() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_len=64
    )
    plain = np.array([1.0, 2 * math.pi / 30, 1e-3], np.float32)
    ratios = scaling.apply(plain, 1e4) / plain
    assert ratios[0] == 1.0
    assert 1 / 8 < ratios[1] < 1.0
    assert ratios[2] == 1 / 8


@pytest.mark.parametrize("materials", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
def test_linear_joins_its_parts(materials: Materials, bias: bool, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    linear = Linear(24, [Part("q", 10), Part("k", 3), Part("v", 4)], bias=bias, materials=materials)
    kept = load(linear)
    names = [f"{part}.{kind}" for part in "qkv" for kind in (["weight", "bias"][: 1 + bias])]
    assert list(kept) == names
    linear.finish()
    x = torch.randn(num_tokens, 24, dtype=materials.dtype)
    expected = torch.cat(
        [x.double() @ kept[f"{p}.weight"].T + kept.get(f"{p}.bias", 0.0) for p in "qkv"], dim=-1
    )
    tolerance = 1e-5 if materials is FP32 else 2e-2
    y = linear(x)
    assert y.dtype == materials.dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 5)


@pytest.mark.parametrize("materials", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_gated_linear_multiplies_its_halves(materials: Materials) -> None:
    torch.manual_seed(0)
    parts = [Part("gate", 7), Part("up", 7)]
    linear = Linear(12, parts, bias=True, gated=True, activation="silu", materials=materials)
    kept = load(linear)
    linear.finish()
    x = torch.randn(5, 12, dtype=materials.dtype)
    gate, up = (x.double() @ kept[f"{p}.weight"].T + kept[f"{p}.bias"] for p in ("gate", "up"))
    y = linear(x)
    assert y.dtype == materials.dtype
    tolerance = 1e-5 if materials is FP32 else 5e-2
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 5)


def test_vectors_that_are_not_loaded_change_nothing() -> None:
    """What dummy weights rely on: scales are 1, biases 0."""
    norm = Norm("norm", 4, NormSpec(eps=1e-6), FP32)
    norm.finish()
    torch.testing.assert_close(norm(torch.ones(1, 4)), torch.ones(1, 4))
    linear = Linear(3, [Part("a", 2)], bias=True, materials=FP32)
    weight, _ = linear.weights()
    weight.load(stored(weight.name, torch.randn(2, 3)))
    linear.finish()
    assert not linear(torch.zeros(1, 3)).any()


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_numbers_need_not_be_aligned(offset: int) -> None:
    norm = Norm("norm", 4, NormSpec(eps=1e-6), FP32)
    (weight,) = norm.weights()
    values = torch.randn(4)
    whole = stored(weight.name, values)
    shifted = np.concatenate([np.zeros(offset, np.uint8), whole.data])[offset:]
    weight.load(whole._replace(data=shifted))
    assert torch.equal(norm.weight, values)


def test_product_works_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packs(torch.float32, "meta")
    assert not packs(torch.float16, "cpu")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    weight, bias, x = torch.randn(5, 3), torch.randn(5), torch.randn(2, 3)
    assert not packs(weight.dtype, weight.device)
    torch.testing.assert_close(product(weight, bias)(x), x @ weight.T + bias)


def test_embedding_and_tied_head() -> None:
    toolkit = TorchToolkit(BF16)
    embedding = toolkit.embedding("embed", 11, 6)
    head = toolkit.head("head", 11, 6, embedding)
    (weight,) = embedding.weights()
    (duplicate,) = head.weights()
    assert weight.duplicate_of is None
    assert (duplicate.name, duplicate.duplicate_of) == ("head.weight", "embed.weight")
    assert duplicate.shape == weight.shape
    table = load(embedding)["embed.weight"]
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    embedding.finish()
    head.finish()
    batch = batch_of(input_ids=torch.tensor([3, 3, 10]))
    vectors = embedding(batch)
    assert torch.equal(vectors.double(), table[batch.input_ids])
    vectors.zero_()  # the caller's own copy
    assert embedding.weight[3].any()
    logits = head(embedding(batch))
    assert logits.dtype == torch.float32
    expected = table[batch.input_ids] @ table.T
    torch.testing.assert_close(logits.double(), expected, rtol=2e-2, atol=2e-2)


def test_untied_head_owns_its_table() -> None:
    head = TorchToolkit(FP32).head("head", 4, 3, None)
    (weight,) = head.weights()
    assert (weight.name, weight.shape, weight.duplicate_of) == ("head.weight", (4, 3), None)

"""Layers against their definitions in fp64, and what they tell the loader."""

from __future__ import annotations

import math

import pytest
import torch

from penstock.layers.embedding import Embedding, LMHead
from penstock.layers.linear import Linear, Part, packs, product
from penstock.layers.norm import RMSNorm
from penstock.layers.rotary import Rotary
from penstock.layers.scaling import LinearScaling, Llama3Scaling, RopeScaling
from penstock.layers.weights import Materials

FP32 = Materials(torch.float32)
BF16 = Materials(torch.bfloat16)


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_rms_norm_is_its_definition(size: int, eps: float) -> None:
    torch.manual_seed(size)
    norm = RMSNorm("norm", size, eps, FP32)
    norm.weight.copy_(torch.randn(size))
    norm.finish()
    x = torch.randn(5, size) * torch.tensor([1e-8, 1e-3, 1.0, 1e3, 1e8])[:, None]
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=3e-6, atol=1e-12)
    zero = torch.zeros(1, size)
    assert torch.equal(norm(zero), zero)


def test_rms_norm_adds_to_the_residual_in_place() -> None:
    norm = RMSNorm("norm", 8, 1e-5, FP32)
    norm.finish()
    residual, x = torch.randn(3, 8), torch.randn(3, 8)
    total = residual + x
    torch.testing.assert_close(norm.add(residual, x), norm(total))
    torch.testing.assert_close(residual, total)


def test_rms_norm_of_bf16_sums_in_fp32() -> None:
    norm = RMSNorm("norm", 4096, 1e-6, BF16)
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
    rotary = Rotary(head_dim, theta, scaling, dtype=torch.float32)
    positions = torch.tensor([0, 1, 5, 250])
    x = torch.randn(4, 3, head_dim)
    y = rotary(x, rotary.angles(positions))
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


def test_llama3_scaling_has_all_three_cases() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_len=64
    )
    ratios = scaling.apply(torch.tensor([1.0, 2 * math.pi / 30, 1e-3])) / torch.tensor(
        [1.0, 2 * math.pi / 30, 1e-3]
    )
    assert ratios[0] == 1.0
    assert 1 / 8 < ratios[1] < 1.0
    assert ratios[2] == 1 / 8


@pytest.mark.parametrize("materials", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
def test_linear_joins_its_parts(materials: Materials, bias: bool, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    linear = Linear(24, [Part("q", 10), Part("k", 3), Part("v", 4)], bias=bias, materials=materials)
    weights = {weight.name: weight.data for weight in linear.weights()}
    names = [f"{part}.{kind}" for part in "qkv" for kind in (["weight", "bias"][: 1 + bias])]
    assert list(weights) == names
    for data in weights.values():
        data.copy_(torch.randn(data.shape))
    kept = {name: data.clone().double() for name, data in weights.items()}
    linear.finish()
    x = torch.randn(num_tokens, 24, dtype=materials.dtype)
    expected = torch.cat(
        [x.double() @ kept[f"{p}.weight"].T + kept.get(f"{p}.bias", 0.0) for p in "qkv"], dim=-1
    )
    tolerance = 1e-5 if materials is FP32 else 2e-2
    y = linear(x)
    assert y.dtype == materials.dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 5)


def test_product_works_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packs(torch.float32, "meta")
    assert not packs(torch.float16, "cpu")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    weight, bias, x = torch.randn(5, 3), torch.randn(5), torch.randn(2, 3)
    assert not packs(weight.dtype, weight.device)
    torch.testing.assert_close(product(weight, bias)(x), x @ weight.T + bias)


def test_embedding_and_tied_head() -> None:
    embedding = Embedding("embed", 11, 6, BF16)
    head = LMHead("head", 11, 6, BF16, tied_to=embedding)
    (weight,) = embedding.weights()
    (duplicate,) = head.weights()
    assert not weight.duplicate
    assert duplicate.duplicate
    assert duplicate.data.data_ptr() == weight.data.data_ptr()
    weight.data.copy_(torch.randn(11, 6))
    embedding.finish()
    head.finish()
    ids = torch.tensor([3, 3, 10])
    vectors = embedding(ids)
    assert torch.equal(vectors, embedding.weight[ids])
    vectors.zero_()  # the caller's own copy
    assert embedding.weight[3].any()
    logits = head(embedding(ids))
    assert logits.dtype == torch.float32
    expected = embedding.weight[ids].float() @ embedding.weight.float().T
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)


def test_untied_head_owns_its_table() -> None:
    head = LMHead("head", 4, 3, FP32)
    (weight,) = head.weights()
    assert (weight.name, tuple(weight.data.shape), weight.duplicate) == (
        "head.weight",
        (4, 3),
        False,
    )

"""Triton's interpreter, as mended, computes what a GPU does."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.jit import INTERPRETED, jit, tl, triton

pytestmark = pytest.mark.skipif(
    triton is None or not INTERPRETED, reason="no kernel is interpreted here"
)


@jit
def _cast(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(x + place).to(out.dtype.element_ty))


@jit
def _dot(a, b, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + place), tl.load(b + place), input_precision="ieee")
    tl.store(out + place, product)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_conversion_rounds_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    magnitude = torch.exp2(torch.randint(-14, 8, (1024,), generator=generator).float())
    x = (torch.rand(1024, generator=generator) + 1) * magnitude
    ends = [0.0, -0.0, 1.9999, -3.9999, 448.0, 460.0, 2.0**-9, 2.0**-10, 3.0 * 2.0**-10]
    x[: len(ends)] = torch.tensor(ends)
    limit = torch.finfo(dtype).max if dtype.itemsize == 1 else 1e30
    for numbers in (x, -x, x * 1e6 if dtype.itemsize == 1 else x):
        out = torch.empty(1024, dtype=dtype)
        _cast[(1,)](numbers, out, SIZE=1024)
        assert torch.equal(out.float(), numbers.clamp(-limit, limit).to(dtype).float())
        back = torch.empty(1024)
        _cast[(1,)](out, back, SIZE=1024)
        assert torch.equal(back, out.float())


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_become_numbers(source: torch.dtype, target: torch.dtype) -> None:
    numbers = [0, 1, 2, 3, 100, 127, -128, -1] + [257, 259, -511, 1023] * (source.itemsize > 1)
    x = torch.tensor(numbers + [0] * (16 - len(numbers))).to(source)
    out = torch.empty(16, dtype=target)
    _cast[(1,)](x, out, SIZE=16)
    assert torch.equal(out, x.to(target))
    back = torch.empty(16, dtype=source)
    _cast[(1,)](out, back, SIZE=16)
    assert torch.equal(back, out.to(source))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot_multiplies_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn((16, 16), generator=generator).to(dtype) for _ in range(2))
    out = torch.empty((16, 16))
    _dot[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@jit
def _exponential(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.exp(tl.load(x + place)))


def test_overflow_is_silent() -> None:
    out = torch.empty(2)
    _exponential[(1,)](torch.tensor([1.0, 1000.0]), out, SIZE=2)
    assert out.tolist() == pytest.approx([2.7182817, float("inf")])

"""Products with quantized matrices: references against float64, layouts, and kernels at the edges.

`test_registry.py` compares every kernel with its reference on the samples of its module.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels import fp8_matmul, int_matmul, split_k
from penstock.kernels.chip import AMPERE, HOPPER, SMALL, Chip
from penstock.kernels.int_words import pack, unpack
from penstock.kernels.op import triton_problem
from penstock.kernels.quantize_fp8 import quantize_fp8

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=f"{triton_problem()}")
every_bits = pytest.mark.parametrize("bits", [4, 8])


def integers(bits: int, *shape: int) -> torch.Tensor:
    low = 0 if bits == 4 else -128
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, low + 2**bits, shape, generator=generator)


def naive_weights(
    q: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Number by number, as the module says: [N, C] float64, rounded to `dtype`."""
    weights = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        for column in range(q.shape[1]):
            number = float(q[row, column])
            if zeros is not None:
                number -= float(zeros[column // group_size, row])
            elif bits == 4:
                number -= 8
            if scales is not None and scales.dtype == torch.uint8:
                number *= float(scales[column // 128, row, column % 128 // 32])
            elif scales is not None:
                number *= float(scales[column // group_size, row].to(dtype))
            weights[row, column] = number
    return weights.to(dtype).double()


@every_bits
def test_layout(bits: int) -> None:
    q = integers(bits, 3, 256)
    packed = pack(q, bits)
    assert packed.dtype == torch.int16
    assert packed.shape == (3, 256 * bits // 16)
    width = 8 * bits
    words = packed.numpy().view(np.uint16)
    for column in range(256):
        run, part, place = column // 128, column % 128 // width, column % width
        found = words[:, run * width + place] >> bits * part & (2**bits - 1)
        assert np.array_equal(found, q[:, column].numpy() & (2**bits - 1))
    assert torch.equal(unpack(packed, bits), q.int())


@pytest.mark.parametrize("sample", list(int_matmul.samples(CPU)), ids=lambda sample: sample[0])
def test_reference_of_integers(sample: Any) -> None:
    _, (x, packed, scales, zeros), given_, tolerance = sample
    bits, group_size = given_["bits"], given_["group_size"]
    q = unpack(packed, bits)
    weights = naive_weights(q, scales, zeros, bits=bits, group_size=group_size, dtype=x.dtype)
    expected = x.double() @ weights[:, : x.shape[1]].T
    expected = expected * given_["row_scales"].double() + given_["bias"].double()
    found = int_matmul.reference(x, packed, scales, zeros, **given_)
    assert found.dtype == x.dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=float(tolerance * expected.abs().mean())
    )


@needs_triton
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@every_bits
def test_every_integer_is_exact(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """With unit vectors as tokens, what comes out is the matrix: each number with each factor."""
    q = torch.arange(2**bits).repeat(32, 128 // 2**bits + 1)[:, :128]
    q = q - 128 if bits == 8 else q
    factors = torch.arange(128).view(1, 32, 4).to(torch.uint8) % 16 if bits == 4 else None
    x = torch.eye(128, dtype=dtype)[::7]
    found = int_matmul.int_matmul.launch(
        x.to(device),
        pack(q, bits).to(device),
        None if factors is None else factors.to(device),
        None,
        bits=bits,
        group_size=32 if bits == 4 else 0,
    )
    expected = q.double()
    if factors is not None:
        expected = (q - 8).double() * factors[0].repeat_interleave(32, 1)
    assert torch.equal(found.cpu().double(), expected[:, ::7].T)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", [15, 127, 128])
def test_instructions(mask: int, dtype: torch.dtype) -> None:
    """The PTX, which no interpreter runs, by its definition: on all words, beside any other."""
    magic = int_matmul._MAGIC[dtype][0]
    words = np.arange(2**16, dtype=np.uint32)
    other = np.random.default_rng(0).permutation(words)
    for shift in range(0, 16, 4 if mask == 15 else 8):
        text = int_matmul._instructions(shift, mask, magic)
        pattern = (
            r"\{ \.reg \.b32 t; shr\.u32 t, \$1, (\d+); lop3\.b32 \$0, t, (\d+), (\d+), (\d+); \}"
        )
        match = re.fullmatch(pattern, text)
        assert match
        by, b, c, table = (np.uint32(number) for number in match.groups())
        a = (other << 16 | words) >> by
        result = np.zeros_like(a)
        for index in range(8):  # the table's bit 4 i + 2 j + k is the result for bits i, j, k
            if int(table) >> index & 1:
                i, j, k = ((~m if not index & bit else m) for m, bit in ((a, 4), (b, 2), (c, 1)))
                result |= i & j & k
        assert np.array_equal(result & 0xFFFF, words >> shift & mask | magic)
        assert np.array_equal(result >> 16, other >> shift & mask | magic)


@needs_triton
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 33, 65])
@every_bits
def test_integers_for_any_number_of_tokens(
    bits: int, num_tokens: int, device: torch.device
) -> None:
    x = torch.randn(num_tokens, 150, device=device).bfloat16()
    packed = pack(integers(bits, 70, 256), bits).to(device)
    given_ = {"bits": bits, "group_size": 0}
    found = int_matmul.int_matmul.launch(x, packed, None, None, **given_)
    expected = int_matmul.reference(x, packed, None, None, **given_)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * 150**0.5)


@needs_triton
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 33, 65])
@pytest.mark.parametrize("group_size", [0, 128])
def test_fp8_for_any_number_of_tokens(
    group_size: int, num_tokens: int, device: torch.device
) -> None:
    x8, x_scale = quantize_fp8(torch.randn(num_tokens, 150, device=device), group_size)
    w8 = torch.randn(130, 150, device=device).to(torch.float8_e4m3fn)
    w_scale = torch.rand((2, 2) if group_size else (130,), device=device) + 0.5
    args = x8, x_scale, w8, w_scale
    found = fp8_matmul.fp8_matmul.launch(*args, out_dtype=torch.float32)
    expected = fp8_matmul.reference(*args, out_dtype=torch.float32)
    exact = fp8_matmul.EXACT if device.type == "cpu" else fp8_matmul.HARDWARE
    torch.testing.assert_close(found, expected, rtol=exact, atol=10 * exact)


@needs_triton
def test_every_tile_is_computed(device: torch.device) -> None:
    """More tiles of rows than one group of programs has, and several of tokens."""
    q = integers(8, 549, 128)
    x = torch.randn(40, 128, device=device)
    given_ = {"bits": 8, "group_size": 0}
    found = int_matmul.int_matmul.launch(x, pack(q, 8).to(device), None, None, **given_)
    expected = x.double() @ q.double().T.to(device)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("sample", list(fp8_matmul.samples(CPU)), ids=lambda sample: sample[0])
def test_reference_of_fp8(sample: Any) -> None:
    _, (x8, x_scale, w8, w_scale), given_, tolerance = sample
    blocks = w_scale.dim() == 2
    expected = torch.zeros(len(x8), len(w8), dtype=torch.float64)
    for first in range(0, x8.shape[1], 128):
        columns = slice(first, first + 128)
        product = x8[:, columns].double() @ w8[:, columns].double().T
        for token in range(len(x8)):
            for row in range(len(w8)):
                of_x = x_scale[token, first // 128] if blocks else x_scale[token]
                of_w = w_scale[row // 128, first // 128] if blocks else w_scale[row]
                expected[token, row] += product[token, row] * of_x.double() * of_w.double()
    if given_["bias"] is not None:
        expected += given_["bias"].double()
    found = fp8_matmul.reference(x8, x_scale, w8, w_scale, **given_)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=float(tolerance * expected.abs().mean())
    )


@pytest.mark.parametrize("group_size", [0, 128])
def test_quantized_to_the_nearest(group_size: int) -> None:
    """Against a table of all numbers that the format has."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = codes[codes.isfinite()].unique().numpy()
    assert table[-1] == 448
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)) * 3
    x[1] = 0
    x[2] *= 1e-42  # its scale would be too small for a reciprocal
    x[3, 7] = 1e30
    x8, scales = quantize_fp8.reference(x, group_size)
    size = group_size or 200
    for token in range(4):
        for first in range(0, 200, size):
            numbers = x[token, first : first + size].double().numpy()
            found = x8[token, first : first + size].double().numpy()
            scale = float(scales[token, first // size] if group_size else scales[token])
            if token in {1, 2}:
                assert scale == 0
                assert not found.any()
                continue
            assert scale == pytest.approx(np.abs(numbers).max() / 448, rel=1e-6)
            nearest = np.abs(numbers[:, None] / scale - table).min(1)
            assert (np.abs(numbers / scale - found) <= nearest + 1e-4).all()


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 20, 34])
@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 blocks"])
def test_shared_sums_are_added_once(
    kind: str, num_tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By five programs, which is more than are loaded at once, tile for tile and time for time."""
    num_rows, num_columns = 70, 620
    cuts = []

    def cut(num_programs: int, num_steps: int, unit: int, *others: Any) -> tuple[int, int]:
        cuts.append((num_steps, unit))
        return num_steps, 1

    monkeypatch.setattr(int_matmul if kind == "int8" else fp8_matmul, "cut", cut)
    bias = torch.randn(num_rows, device=device)
    x = torch.randn(num_tokens, num_columns, device=device)
    if kind == "int8":
        op: Any = int_matmul.int_matmul
        packed = pack(integers(8, num_rows, 640), 8).to(device)
        args: Any = x, packed, None, None
        options = {"bits": 8, "group_size": 0, "row_scales": torch.rand(num_rows, device=device)}
    else:
        op = fp8_matmul.fp8_matmul
        x8, x_scale = quantize_fp8(x, 128 if "blocks" in kind else 0)
        w8 = torch.randn(num_rows, num_columns, device=device).to(torch.float8_e4m3fn)
        w_scale = torch.rand((1, 5) if "blocks" in kind else (num_rows,), device=device)
        args, options = (x8, x_scale, w8, w_scale), {"out_dtype": torch.float32}
    expected = op.reference(*args, bias=bias, **options)
    found = [op.launch(*args, bias=bias, **options) for _ in range(2)]
    assert cuts == [(5, 1)] * 2
    assert torch.equal(found[0], found[1])
    exact = 1e-5 if device.type == "cpu" else fp8_matmul.HARDWARE
    mean = float(expected.abs().mean())
    torch.testing.assert_close(found[0], expected, rtol=exact, atol=10 * exact * mean)
    assert not split_k.counters(device).any(), "ready for the next product"


@given(
    programs=st.integers(1, 2000),
    steps=st.integers(1, 500),
    unit=st.sampled_from([1, 2]),
    waves=st.integers(1, 2),
)
def test_parts_cover_the_inner_dimension(programs: int, steps: int, unit: int, waves: int) -> None:
    steps *= unit
    parts, length = split_k.cut(programs, steps, unit, waves, CPU)
    assert length % unit == 0
    assert (parts - 1) * length < steps <= parts * length
    assert parts == 1 or length >= 8 * unit
    assert parts == 1 or programs * parts <= waves * SMALL.multiprocessors


@pytest.mark.parametrize("chip", [HOPPER, AMPERE, SMALL], ids=str)
def test_tiles_fit_into_shared_memory(chip: Chip) -> None:
    for num_tokens in (1, 32, 33, 64, 65, 512, 513, 8192):
        for bits, num_rows in ((4, 4096), (8, 4096), (8, 512)):
            for dtype in (torch.bfloat16, torch.float32):
                for num_tables in (0, 1, 8):
                    form = int_matmul._shape(
                        num_tokens, num_rows, 32, bits, num_tables, dtype, chip
                    )
                    assert form["STAGES"] >= 2
        assert fp8_matmul._shape(num_tokens, chip)["STAGES"] >= 2

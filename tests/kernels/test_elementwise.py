"""The references of the elementwise operations against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from penstock.kernels import gated, rope_store, step_inputs
from penstock.kernels.add_rms_norm import reference as add_rms_norm


@pytest.mark.parametrize("with_x", [True, False])
def test_add_rms_norm(with_x: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn((3, 7), generator=generator)
    x = torch.randn((3, 7), generator=generator) if with_x else None
    weight = torch.randn(7, generator=generator)
    sums = [
        [residual[t, i].item() + (x[t, i].item() if x is not None else 0.0) for i in range(7)]
        for t in range(3)
    ]
    out = add_rms_norm(x, residual, weight, 0.25)
    for t, row in enumerate(sums):
        assert residual[t].tolist() == pytest.approx(row, rel=1e-6)
        root = math.sqrt(sum(number**2 for number in row) / 7 + 0.25)
        expected = [number / root * weight[i].item() for i, number in enumerate(row)]
        assert out[t].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_norm_is_of_the_rounded_sum() -> None:
    residual = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)  # 257 is no bfloat16; 256 is
    weight = torch.ones(2)
    out = add_rms_norm(x, residual, weight, 0.0)
    assert residual.tolist() == [[256.0, 1.0]]
    assert out.dtype == torch.bfloat16
    assert out[0, 0].item() == torch.tensor(256 / math.sqrt((256**2 + 1) / 2)).bfloat16().item()


ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_gated(activation: str) -> None:
    x = torch.tensor([[-5.0, -0.5, 0.0, 3.0, 2.0, 3.0, 5.0, -7.0], [1.0] * 8])
    out = gated.reference(x, activation)
    for t, row in enumerate(x.tolist()):
        expected = [ACTIVATIONS[activation](row[i]) * row[4 + i] for i in range(4)]
        assert out[t].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gated_rounds_the_activation_as_torch_does() -> None:
    x = torch.rand((1, 200), generator=torch.Generator().manual_seed(2)).bfloat16()
    gate, up = x.chunk(2, -1)
    assert torch.equal(gated.reference(x), torch.nn.functional.silu(gate) * up)


def rotated(vector: list[float], position: int, frequencies: list[float]) -> list[float]:
    """The pairs (i, i + D / 2) as complex numbers, turned."""
    half = len(vector) // 2
    turned = [
        complex(vector[i], vector[i + half])
        * complex(math.cos(position * frequencies[i]), math.sin(position * frequencies[i]))
        for i in range(half)
    ]
    return [number.real for number in turned] + [number.imag for number in turned]


@pytest.mark.parametrize("kind", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_rope_store(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    num_heads, num_kv_heads, dim, block_size = 3, 2, 6, 4
    qkv = torch.randn((3, (num_heads + 2 * num_kv_heads) * dim), generator=generator)
    qkv[1, -dim:] = 0.0  # the last value vector of a token
    before = qkv.reshape(3, -1, dim).tolist()
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    positions, slots = torch.tensor([0, 7, 300]), torch.tensor([9, 2, 4])
    pages = [torch.zeros((3, num_kv_heads, block_size, dim)).to(kind) for _ in range(2)]
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}.get(kind)
    scales = [torch.ones((3, num_kv_heads, block_size)) if largest else None for _ in range(2)]
    rope_store.reference(
        qkv, frequencies, positions.int(), slots, *pages, *scales,
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim,
    )  # fmt: skip
    after = qkv.reshape(3, -1, dim)
    # Half a step of the format: absolute for int8, relative for fp8.
    half_step = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}.get(kind, 1e-5)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        expected = [
            vector if h >= num_heads + num_kv_heads else rotated(vector, position, [1.0, 0.1, 0.01])
            for h, vector in enumerate(before[t])
        ]
        for h in range(num_heads):
            assert after[t, h].tolist() == pytest.approx(expected[h], rel=1e-5, abs=1e-5)
        assert after[t, num_heads:].tolist() == before[t][num_heads:]
        block, offset = divmod(slot, block_size)
        for k in range(2):
            for h in range(num_kv_heads):
                stored = pages[k][block, h, offset].float()
                wanted = expected[num_heads + k * num_kv_heads + h]
                longest = max(map(abs, wanted))
                if largest:
                    scale = scales[k][block, h, offset].item()
                    assert scale == pytest.approx(longest / largest, rel=1e-5)
                    assert stored.abs().max() == (largest if longest else 0.0)
                    stored = stored * scale
                assert stored.tolist() == pytest.approx(wanted, abs=1.001 * half_step * longest)
    untouched = [slot for slot in range(12) if slot not in slots]
    for page in pages:
        flat = page.float().transpose(1, 2).reshape(12, -1)
        assert not flat[untouched].any()


def test_int8_pages_round_to_even(device: torch.device) -> None:
    vector = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.4]])
    qkv = torch.cat((torch.zeros(1, 16), vector), 1).to(device)
    pages = [torch.zeros((1, 1, 1, 8), dtype=torch.int8, device=device) for _ in range(2)]
    scales = [torch.ones((1, 1, 1), device=device) for _ in range(2)]
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    rope_store.rope_store(
        qkv, torch.ones(4, device=device), zero.int(), zero, *pages, *scales,
        num_heads=1, num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    assert pages[1].flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, 100]
    assert scales[1].item() == 1.0
    assert scales[0].item() == 0.0


def test_step_inputs() -> None:
    rows, starts, lengths = [4, 0, 2, 3], [5, 0, 17, 1], [1, 6, 1, 3]
    query_start = [0, 1, 7, 8, 11]
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(0, 999, (5, 32), generator=generator, dtype=torch.int32)
    table = torch.randint(0, 2**30, (5, 11), generator=generator, dtype=torch.int32)
    outputs = [torch.empty(11, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.int64)]
    arrays = [torch.tensor(numbers, dtype=torch.int32) for numbers in (rows, starts, query_start)]
    step_inputs.reference(*arrays, token_ids, table, 3, *outputs)
    expected = [
        (
            token_ids[row, start + i].item(),
            start + i,
            table[row, (start + i) // 3].item() * 3 + (start + i) % 3,
        )
        for row, start, length in zip(rows, starts, lengths, strict=True)
        for i in range(length)
    ]
    assert list(zip(*(output.tolist() for output in outputs), strict=True)) == expected

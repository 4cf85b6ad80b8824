"""What a linear op does with its products, through ctypes against torch: activations, scale, soft
cap, and block-diagonal maps. Accuracy near the ends is `csrc/tests/test_linear.cpp`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops_program import F32, FORMATS, MAX_TOKENS, get, packed, put, step_of, unpacked
from torch.nn import functional

from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.native.structs import Activation, Epilogue, Isa, LinearArgs, OpKind
from penstock.native.weights import PackedWeight, padded_rows
from penstock.quantization.schemes import Format

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.IDENTITY: lambda x: x,
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
    Activation.RELU_SQUARED: lambda x: functional.relu(x) ** 2,
}


def run(pool: Pool, weight: PackedWeight, x: F32, y_width: int, **fields: Any) -> F32:
    """y [T, y_width] of a linear op."""
    program = Program(pool, MAX_TOKENS, 1)
    x_value, y_value = program.value(x.shape[1], "float32"), program.value(y_width, "float32")
    args = LinearArgs(
        weight=weight.struct,
        x_stride=x.shape[1],
        y_stride=y_width,
        x_dtype=x_value.dtype_id,
        y_dtype=y_value.dtype_id,
        activation_bits=16,
        **{"num_groups": 1, "num_outputs": y_width, "y_scale": 1.0} | fields,
    )
    program.append(OpKind.LINEAR, args, x=x_value, y=y_value)
    part = program.end_part()
    program.finish()
    put(program, x_value, x)
    program.set_step(step_of(len(x)))
    program.run(part)
    return get(program, y_value, len(x))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_activations(pool: Pool, isa: Isa, activation: Activation, softcap: float) -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((50, 40), np.float32)
    x = rng.standard_normal((9, 40)).astype(np.float32)
    weight = packed(pool, FORMATS[0], matrix)
    found = run(pool, weight, x, 50, activation=activation, y_scale=0.7, softcap=softcap)
    y = ACTIVATIONS[activation](torch.from_numpy(x).double() @ torch.from_numpy(matrix).double().T)
    y = y * 0.7
    expected = softcap * torch.tanh(y / softcap) if softcap else y
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 6, MAX_TOKENS])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_groups(pool: Pool, isa: Isa, form: Format, num_tokens: int) -> None:
    """Heads with a matrix each, out of rows that hold something else too."""
    heads, num_outputs, num_columns = 5, 36, 96
    rng = np.random.default_rng(2)
    panels = padded_rows(num_outputs)
    source = np.zeros((heads * panels, num_columns), np.float32)
    rows = (np.arange(heads)[:, None] * panels + np.arange(num_outputs)).reshape(-1)
    source[rows] = rng.standard_normal((len(rows), num_columns), np.float32)
    weight = packed(pool, form, source)
    x = rng.standard_normal((num_tokens, heads, num_columns + 4)).astype(np.float32)
    found = run(
        pool,
        weight,
        x.reshape(num_tokens, -1),
        heads * 40,
        num_groups=heads,
        num_outputs=num_outputs,
        x_group_stride=num_columns + 4,
        y_group_stride=40,
        epilogue=Epilogue.STORE,
    )
    matrices = unpacked(form, weight)[rows].reshape(heads, num_outputs, num_columns)
    seen = torch.from_numpy(x[..., :num_columns])
    seen = seen if form.dtype == "float32" else seen.bfloat16()
    expected = torch.einsum("thk,hnk->thn", seen.double(), torch.from_numpy(matrices).double())
    y = found.reshape(num_tokens, heads, 40)[..., :num_outputs]
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-4)

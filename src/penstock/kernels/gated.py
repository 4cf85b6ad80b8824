"""The gate of a feed-forward layer: act(gate) * up.

    out[t, i] = act(x[t, i]) * x[t, I + i]      act in fp32, rounded, as the product is

x is [T, 2 I], out is [T, I]. act is silu (x * sigmoid(x)), gelu (x * Phi(x), Hendrycks and Gimpel
2016) or its approximation by tanh. One program has `BLOCK` numbers of one token, a thread 8 of
them, which are 16 bytes in the 16-bit formats.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from penstock.kernels.jit import jit, tl, triton
from penstock.kernels.op import Compilation, Op, Sample

_BLOCK = 1024
_NUM_WARPS = 4
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@jit
def _gated_kernel(
    x_ptr,  # [T, 2 * SIZE]
    out_ptr,  # [T, SIZE], contiguous
    x_stride,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < SIZE
    place = x_ptr + token * x_stride + column
    gate = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(place + SIZE, mask=valid, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # (1 + tanh(u)) / 2 = sigmoid(2 u), which loses nothing where tanh is near -1
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    kind = out_ptr.dtype.element_ty
    out = (active.to(kind).to(tl.float32) * up).to(kind)
    tl.store(out_ptr + token * SIZE + column, out, mask=valid)


def _gated(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up, [T, I], of x [T, 2 I], whose rows may be apart: the gates, then the ups.

    Args:
        activation: one of `ACTIVATIONS`.
    """
    assert activation in ACTIVATIONS, f"no such activation: {activation}"
    assert x.stride(1) == 1, "a row lies in one piece"
    num_tokens, size = len(x), x.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    _gated_kernel[(num_tokens, triton.cdiv(size, _BLOCK))](
        x, out, x.stride(0), SIZE=size, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=_NUM_WARPS
    )
    return out


def reference(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The same in torch."""
    gate, up = x.chunk(2, -1)
    if activation == "silu":
        active = functional.silu(gate.float())
    else:
        approximation = "tanh" if activation == "gelu_tanh" else "none"
        active = functional.gelu(gate.float(), approximate=approximation)
    return active.to(x.dtype) * up


def samples(device: torch.device) -> Iterator[Sample]:
    """Each activation, over gates from -24 to 24; odd sizes, rows apart, no token."""
    generator = torch.Generator().manual_seed(2)

    def uniform(num_tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Gates and ups; between the rows lies room for two more."""
        wide = torch.rand((num_tokens, 2 * size + 2), generator=generator) * 48 - 24
        return wide.to(device, dtype)[:, : 2 * size]

    for activation in ACTIVATIONS:
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)):
            yield f"{activation} {dtype}", (uniform(3, 1031, dtype), activation), {}, tolerance
    yield "one number, silu by default", (uniform(1, 1, torch.float32),), {}, 2e-6
    yield "no token", (uniform(0, 64, torch.float16),), {}, 0.0


gated = Op(_gated, reference, samples)


def compilations() -> Iterator[Compilation]:
    """Each activation."""
    signature = {"x_ptr": "*bf16:16", "out_ptr": "*bf16:16", "x_stride": "i32:16"}
    for activation in ACTIVATIONS:
        constexprs = {"SIZE": 14336, "ACTIVATION": activation, "BLOCK": _BLOCK}
        yield Compilation(f"gated {activation}", _gated_kernel, signature, constexprs, _NUM_WARPS)

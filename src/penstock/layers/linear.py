"""Linear maps that know which tensors of a checkpoint they are made of.

Owns the weights of a map and how they lie in memory. One map may join several of a checkpoint
(query, key and value; gate and up), because one wide product is faster than several narrow ones.

Invariant: whoever applies a map does not know how its numbers are stored.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn import functional

from penstock.layers.materials import Materials, weight
from penstock.layers.specs import Activation
from penstock.layers.toolkit import Part, Weight

Product = Callable[[torch.Tensor], torch.Tensor]


def product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The fastest way that torch has here to map x [T, in] to x W^T + b.

    On x86 that is oneDNN with a weight packed once (what torch's own compiler emits for a frozen
    model): 1.3 to 2.5 times as fast as `functional.linear` up to 64 tokens when the weights come
    from memory. The result holds its own copy of `weight` then, and does not need the original.
    """
    if not packs(weight.dtype, weight.device):
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    apply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: apply(x, packed, bias, "none", [], "")


def packs(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether `product` keeps a packed copy of such a weight."""
    if (
        torch.device(device).type != "cpu"
        or platform.machine() not in {"x86_64", "AMD64"}
        or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


def gate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up of x [..., 2 * size], gate first.

    "swiglu_oai" is GPT-OSS's: clipped, and with a sigmoid of 1.702 times the gate.
    """
    gates, ups = x.chunk(2, -1)
    if activation == "swiglu_oai":
        gates, ups = gates.clamp(max=7.0), ups.clamp(-7.0, 7.0)
        return (ups + 1) * (gates * torch.sigmoid(1.702 * gates))
    return ACTIVATIONS[activation](gates).mul_(ups)


class Linear:
    """y = x W^T + b, where the rows of W are those of its parts, one after the other.

    A gated one has two parts of equal size, gate and up, and returns activation(gate) * up.
    """

    def __init__(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        materials: Materials,
        gated: bool = False,
        activation: Activation | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self._gated = gated
        self._activation = activation
        out_size = sum(part.num_rows for part in parts)
        self.weight = materials.empty(out_size, in_size)
        self.bias = materials.empty(out_size).zero_() if bias else None

    def weights(self) -> Iterator[Weight]:
        """Weight and bias of every part: slices of the joined ones."""
        first = 0
        for part in self.parts:
            rows = slice(first, first + part.num_rows)
            yield weight(f"{part.name}.weight", self.weight[rows], rows=part.rows)
            if self.bias is not None:
                yield weight(f"{part.name}.bias", self.bias[rows], rows=part.rows)
            first += part.num_rows

    def finish(self) -> None:
        """Pack the weight; the rows that were loaded are given up."""
        self._product = product(self.weight, self.bias)
        del self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, in] to [T, out]; gated: to [T, out / 2]."""
        y = self._product(x)
        if self._activation is None:
            return y
        return gate(y, self._activation) if self._gated else ACTIVATIONS[self._activation](y)

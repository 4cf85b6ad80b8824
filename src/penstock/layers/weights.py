"""How a layer says what it is made of: the numbers it holds and where a checkpoint keeps them.

Owns `Weight`, `Materials` and the `Layer` protocol. Knows neither files nor models.

Invariant: the loader copies by name and shape and knows nothing else; how a checkpoint's tensors
lie in memory (joined, transposed, packed) is the business of the layer that holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Weight(NamedTuple):
    """One tensor of a checkpoint and the memory it is copied into."""

    name: str  # as in the checkpoint
    data: torch.Tensor  # has the shape of the checkpoint's tensor; often a view of a larger one
    duplicate: bool = False  # `data` is filled under another name; if present, it must be equal


@dataclass(frozen=True, slots=True)
class Materials:
    """What the layers of one model are made of."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for a parameter."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Layer(Protocol):
    """A leaf of a model: it holds numbers."""

    def weights(self) -> Iterator[Weight]:
        """Everything that a checkpoint must fill. Called before `finish`."""

    def finish(self) -> None:
        """All weights are filled: derive what the forward pass reads. Called once."""

"""The ranks of one model, behind four verbs; one rank alone does nothing.

Owns the collective operations. Knows tensors; knows neither models nor plans.
"""

from __future__ import annotations

from typing import Protocol, final

import torch


class Group(Protocol):
    """The ranks that hold one model's weights between them (Shoeybi et al. 2019)."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def size(self) -> int:
        """How many they are."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; `x` is contiguous and of one shape everywhere."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of each rank to [..., size * n]: joined along the last dimension, by rank."""


@final
class Alone:
    """Implements `Group` for one rank."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

"""From token ids to vectors and from vectors to logits.

Owns the two tables, which are one if the model ties them. Which positions get logits is the
caller's business. Invariant: logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from penstock.layers.linear import product
from penstock.layers.weights import Materials, Weight


class Embedding:
    """One vector for each token id."""

    def __init__(self, name: str, num_rows: int, size: int, materials: Materials) -> None:
        self.name = name
        self.weight = materials.empty(num_rows, size)

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]."""
        yield Weight(f"{self.name}.weight", self.weight)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [T, size] of ids [T]: a new tensor, which the caller may change."""
        return functional.embedding(ids, self.weight)


class LMHead:
    """Scores of all token ids: one product with a table of its own, or with the embedding's."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: Materials,
        *,
        tied_to: Embedding | None = None,
    ) -> None:
        self.name = name
        self._tied = tied_to is not None
        self.weight = materials.empty(num_rows, size) if tied_to is None else tied_to.weight

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one."""
        yield Weight(f"{self.name}.weight", self.weight, duplicate=self._tied)

    def finish(self) -> None:
        """Pack the table; where that makes a copy, a tied table is held twice."""
        self._product = product(self.weight, None)
        del self.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of hidden [L, size]."""
        return self._product(hidden).float()

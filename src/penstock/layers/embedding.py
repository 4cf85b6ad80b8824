"""From token ids to vectors and from vectors to logits.

Owns the two tables, which are one if the model ties them. Which positions get logits is the
caller's business. Invariant: logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from penstock.attention.base import TorchBatch
from penstock.layers.linear import product
from penstock.layers.materials import Materials, weight
from penstock.layers.toolkit import Weight


class Embedding:
    """One vector for each token id."""

    def __init__(self, name: str, num_rows: int, size: int, materials: Materials) -> None:
        self.name = name
        self.weight = materials.empty(num_rows, size)

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]."""
        yield weight(f"{self.name}.weight", self.weight)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, batch: TorchBatch) -> torch.Tensor:
        """Vectors [T, size] of the batch's ids: a new tensor, which the caller may change."""
        return functional.embedding(batch.input_ids, self.weight)


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
        self._duplicate_of = None if tied_to is None else f"{tied_to.name}.weight"
        self.weight = materials.empty(num_rows, size) if tied_to is None else tied_to.weight

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one."""
        yield weight(f"{self.name}.weight", self.weight, self._duplicate_of)

    def finish(self) -> None:
        """Pack the table; where that makes a copy, a tied table is held twice."""
        self._product = product(self.weight, None)
        del self.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of hidden [L, size]."""
        return self._product(hidden).float()

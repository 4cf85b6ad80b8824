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
from penstock.layers.toolkit import PositionTable, Weight


class Embedding:
    """One vector for each token id, and perhaps one for its position."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: Materials,
        *,
        scale: float,
        positions: PositionTable | None,
    ) -> None:
        self.name = name
        self.weight = materials.empty(num_rows, size)
        self._scale = scale
        self._positions = positions
        if positions is not None:
            self._table = materials.empty(positions.num_rows, size)
            self._types = materials.empty(positions.num_types, size).zero_()

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size], and those of positions and of kinds of tokens."""
        yield weight(f"{self.name}.weight", self.weight)
        if self._positions is not None:
            yield weight(f"{self._positions.name}.weight", self._table)
            if self._positions.types is not None:
                yield weight(f"{self._positions.types}.weight", self._types)

    def finish(self) -> None:
        """Add to the positions what every token of a type gets: a copy of them for each type."""
        if self._positions is not None and self._positions.types is not None:
            self._table = (self._types[:, None] + self._table).flatten(0, 1)
            del self._types

    def __call__(self, batch: TorchBatch) -> torch.Tensor:
        """Vectors [T, size] of the batch's ids: a new tensor, which the caller may change."""
        vectors = functional.embedding(batch.input_ids, self.weight)
        if self._scale != 1.0:
            vectors *= self._scale
        if self._positions is not None:
            rows = batch.positions + self._positions.first_row
            vectors += functional.embedding(rows.clamp(max=len(self._table) - 1), self._table)
        return vectors


class LMHead:
    """Scores of all token ids: one product with a table of its own, or with the embedding's."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        size: int,
        materials: Materials,
        *,
        tied_to: Embedding | None,
        bias: bool,
        scale: float,
        softcap: float,
    ) -> None:
        self.name = name
        self._duplicate_of = None if tied_to is None else f"{tied_to.name}.weight"
        self.weight = materials.empty(num_rows, size) if tied_to is None else tied_to.weight
        self.bias = materials.empty(num_rows).zero_() if bias else None
        self._scale = scale
        self._softcap = softcap

    def weights(self) -> Iterator[Weight]:
        """The table, [num_rows, size]; a checkpoint may repeat a tied one."""
        yield weight(f"{self.name}.weight", self.weight, self._duplicate_of)
        if self.bias is not None:
            yield weight(f"{self.name}.bias", self.bias)

    def finish(self) -> None:
        """Pack the table; where that makes a copy, a tied table is held twice."""
        self._product = product(self.weight, self.bias)
        del self.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of hidden [L, size]."""
        scores = self._product(hidden).float()
        if self._scale != 1.0:
            scores *= self._scale
        if self._softcap:
            scores = scores.div_(self._softcap).tanh_().mul_(self._softcap)
        return scores

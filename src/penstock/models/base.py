"""What the engine asks of a loaded model, whichever backend computes it.

Owns the `Model` protocol. A model brings its KV store with it; the engine knows slots by number.
Imports no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.models.batch import ForwardBatch
from penstock.models.spec import ModelSpec
from penstock.sampling.base import Choose


class Model(Protocol):
    """A decoder with its weights and its KV store. Called from one thread."""

    @property
    def spec(self) -> ModelSpec:
        """Its shapes and constants."""

    @property
    def description(self) -> str:
        """The backend and what it runs on, for people: `native, avx512, 2 threads`."""

    def forward(self, batch: ForwardBatch) -> None:
        """Compute all tokens of the batch and write their keys and values.

        The hidden states stay, for `logits`, until the next call.
        """

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of the next token, [L, V], after the tokens `rows` [L] of the last batch.

        Args:
            rows: indices into the batch's tokens, increasing, at least one.

        Returns:
            An array that is valid until the next call; the caller does not change it.
        """

    def hidden(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The last hidden states, [N, hidden], of the tokens `rows` [N] of the last batch.

        Behind the model's last norm. The caller owns the array.
        """

    def classify(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw scores of labels, [N, labels], of pooled hidden states [N, hidden].

        Only of a model whose spec has a classifier.
        """

    @property
    def choose(self) -> Choose | None:
        """A faster way to choose tokens than the sampler's own, if the backend has one."""

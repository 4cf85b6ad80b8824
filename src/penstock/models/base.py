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


class Choose(Protocol):
    """A backend's own way to choose tokens, with the meaning that `engine.sampler` gives."""

    def __call__(
        self,
        logits: NDArray[np.float32],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        min_p: NDArray[np.float32],
        draws: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """One token for each row of `logits` [L, V]; the other arrays are [L].

        Temperature 0 is the most likely token (the lowest id of several), as is a row without a
        finite largest logit. `top_k` 0 is no limit. `draws` are the random numbers, in [0, 1).
        """


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

    @property
    def choose(self) -> Choose | None:
        """A faster way to choose tokens than the sampler's own, if the backend has one."""

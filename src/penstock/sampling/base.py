"""What a backend may bring to choose tokens itself.

Owns the `Choose` protocol. Imports no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Choose(Protocol):
    """A backend's own way to choose tokens, with the meaning that `sampling.host` gives."""

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

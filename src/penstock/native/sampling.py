"""Chooses tokens in the native library: no pass over the vocabulary in Python.

Owns the call; what the settings mean is written in `penstock.sampling.host`.
"""

from __future__ import annotations

from ctypes import byref

import numpy as np
from numpy.typing import NDArray

from penstock.native.pool import Pool
from penstock.native.structs import SampleArgs


class Sampler:
    """Implements `penstock.sampling.base.Choose` on the threads of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __call__(
        self,
        logits: NDArray[np.float32],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        min_p: NDArray[np.float32],
        draws: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """See `penstock.sampling.base.Choose`.

        Raises:
            EngineError: there is no memory for two more copies of a row for each thread.
        """
        num_rows, vocab_size = logits.shape
        assert logits.strides[1] == logits.itemsize
        token_ids = np.empty(num_rows, np.int64)
        arrays = [
            np.ascontiguousarray(array, dtype)
            for array, dtype in (
                (temperature, np.float32),
                (top_k, np.int32),
                (top_p, np.float32),
                (min_p, np.float32),
                (draws, np.float64),
            )
        ]
        assert all(len(array) == num_rows for array in arrays)
        args = SampleArgs(
            logits.ctypes.data,
            logits.strides[0] // logits.itemsize,
            vocab_size,
            num_rows,
            *(array.ctypes.data for array in arrays),
            token_ids.ctypes.data,
        )
        self._pool.library.call("penstock_sample", self._pool.handle, byref(args))
        return token_ids

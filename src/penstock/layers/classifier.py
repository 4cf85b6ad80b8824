"""The map from one pooled vector to scores of labels, in numpy: the same for every backend.

Owns a classifier's weights, always float32: they are few, and so is what is multiplied with them.
Imports no torch and no native library.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from penstock.layers.specs import ClassifierSpec
from penstock.layers.toolkit import CodedTensor, Stored, Weight

F32 = NDArray[np.float32]


class Classifier:
    """Implements `Layer`: output(tanh(dense(x))), or without a dense map output(x)."""

    def __init__(self, spec: ClassifierSpec, size: int) -> None:
        self._maps: list[tuple[str, F32, F32 | None]] = []  # name, weight, bias
        if spec.dense:
            self._add(spec.dense, size, size, has_bias=True)
        self._add(spec.output, spec.num_labels, size, has_bias=spec.has_bias)

    def _add(self, name: str, num_rows: int, size: int, *, has_bias: bool) -> None:
        bias = np.zeros(num_rows, np.float32) if has_bias else None
        self._maps.append((name, np.zeros((num_rows, size), np.float32), bias))

    def weights(self) -> Iterator[Weight]:
        """Of each map the matrix and perhaps a bias."""
        for name, matrix, bias in self._maps:
            yield Weight(f"{name}.weight", matrix.shape, partial(_take, matrix))
            if bias is not None:
                yield Weight(f"{name}.bias", bias.shape, partial(_take, bias))

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, pooled: F32) -> F32:
        """Scores [N, labels] of pooled vectors [N, size]: raw, as they come out of the last map."""
        x = pooled
        for index, (_, matrix, bias) in enumerate(self._maps):
            x = (np.tanh(x) if index else x) @ matrix.T
            if bias is not None:
                x = x + bias
        return x


def _take(target: F32, stored: Stored) -> None:
    if isinstance(stored, CodedTensor):
        target[:] = stored.values()
        return
    raw = stored.data.tobytes()  # which need not have been aligned
    match stored.dtype:
        case "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F16":
            values = np.frombuffer(raw, np.float16).astype(np.float32)
        case _:
            values = np.frombuffer(raw, np.float32)
    target[:] = values.reshape(target.shape)

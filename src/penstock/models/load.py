"""From a directory to a model that runs, on the backend that is asked for.

Owns the choice of backend. Imports torch only for the backend that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from penstock.models.base import Model
from penstock.models.loader import LoadFormat

Backend = Literal["torch"]


def load_model(
    path: Path | str,
    *,
    backend: Backend,
    dtype: str,
    num_blocks: int,
    block_size: int,
    num_threads: int | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    phases: dict[str, float] | None = None,
) -> Model:
    """Build the model of a directory, load its weights and make its KV store.

    Args:
        backend: who computes.
        dtype: of weights, activations and KV store: a key of `penstock.models.spec.ITEM_BYTES`.
        num_blocks, block_size: the KV store has a slot for each token of each block.
        num_threads: CPU threads of the process's backend; None: what suits the model.
        load_format: "dummy" reads config.json only and draws the weights from `seed`.
        phases: takes the seconds of "import", "load" and "kv".

    Raises:
        UnsupportedModel: the config asks for what is not implemented.
        WeightMismatch: weights are missing, unexpected, misshapen or contradictory.
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
    """
    phases = {} if phases is None else phases
    with timed(phases, "import"):
        assert backend == "torch", backend
        from penstock.models import torch_model
    return torch_model.load(
        Path(path),
        dtype=dtype,
        num_slots=num_blocks * block_size,
        num_threads=num_threads,
        load_format=load_format,
        seed=seed,
        phases=phases,
    )


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds that the block took."""
    started_s = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - started_s

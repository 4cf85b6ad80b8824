"""Engines for tests that need a GPU: real kernels, real graphs, random weights or brook's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.engine.core import EngineCore


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    """A model of a billion weights, with 64 rows and without a prefix cache."""
    from benchmarks.gpu.engines import engine

    with engine("llama-3.2-1b", max_num_seqs=64, max_model_len=4096, num_blocks=8192) as made:
        yield made

"""What every test may use. Nothing here reaches the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from penstock.native import library
from penstock.native.structs import Isa

# Many small tests on few cores: torch's own threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("penstock", deadline=None, print_blob=True)
settings.load_profile("penstock")


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where whatever a test loads keeps its weights: never in the home of who runs the tests."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["PENSTOCK_CACHE"] = str(directory)
    return directory


@pytest.fixture
def batch_invariant_isa() -> Iterator[None]:
    """AMX adds up bfloat16 in another order from some number of rows on; its integers are exact."""
    found = library.load()
    before = found.isa
    if before == Isa.AMX:
        found.set_isa(Isa.AVX512)
    yield
    found.set_isa(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared real data; tests that need it are skipped where it is absent."""
    root = os.environ.get("PENSTOCK_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("PENSTOCK_DATA does not name the data directory")
    return Path(root)

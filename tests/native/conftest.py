"""The native library for tests; without one they are skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `ops_oracle`

from penstock.native import library as native
from penstock.native.library import Library, isa_name
from penstock.native.pool import Pool
from penstock.native.structs import Isa


@pytest.fixture(scope="session")
def library() -> Library:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    return native.load()


@pytest.fixture(params=list(Isa), ids=isa_name)
def isa(library: Library, request: pytest.FixtureRequest) -> Iterator[Isa]:
    """Every instruction set of this machine, one after the other."""
    if request.param not in library.available_isas:
        pytest.skip(f"{isa_name(request.param)} is not available")
    before = library.isa
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before)


@pytest.fixture(scope="session")
def pool(library: Library) -> Pool:
    return Pool(library, 2)

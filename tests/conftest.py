"""What every test may use. Nothing here reaches the network."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from penstock.native import library
from penstock.native.structs import Isa

if TYPE_CHECKING:
    import torch

# Looked up without importing torch, which most tests do not need and which takes a second.
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) and not version("torch").endswith("+cpu")

# Many small tests on few cores: torch's own threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not HAS_GPU:  # has to be there before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("penstock", deadline=None, print_blob=True)
settings.load_profile("penstock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="there is no GPU that torch can use")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU where there is none: kernels then run through Triton's interpreter."""
    import torch

    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="module")
def references() -> Iterator[None]:
    """References compute where there is no GPU: the interpreter takes a hundred times as long."""
    if HAS_GPU:
        yield
        return
    from penstock.kernels.op import forced

    with forced("reference"):
        yield


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


def _as_nobody() -> dict[str, str]:
    """PostgreSQL does not run as root."""
    return {"user": "nobody"} if os.geteuid() == 0 else {}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server without its database's name."""
    if not all(map(shutil.which, ("initdb", "pg_ctl"))):
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    # Not in pytest's directory, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as root:
        data = Path(root) / "data"
        if os.geteuid() == 0:
            shutil.chown(root, "nobody")
        run = {"cwd": root, "check": True, "stdout": subprocess.DEVNULL, **_as_nobody()}
        initdb = ["initdb", "-D", str(data), "-U", "tester", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, **run)  # type: ignore[call-overload]
        control = ["pg_ctl", "-D", str(data), "-w", "-l", f"{root}/log"]
        options = f"-k {root} -c listen_addresses= -c fsync=off"
        subprocess.run([*control, "-o", options, "start"], **run)  # type: ignore[call-overload]
        try:
            yield f"postgresql://tester@/{{name}}?host={root}"
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, **run)  # type: ignore[call-overload]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "test.sqlite")
    import sqlalchemy as sa

    url: str = request.getfixturevalue("postgres")
    name = f"test_{secrets.token_hex(4)}"
    address = url.format(name="postgres").replace("postgresql:", "postgresql+psycopg:")
    admin = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return url.format(name=name)

"""Fixtures of the server's tests: an application over a fake engine, in memory or on a socket."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `server_fakes`

from server_fakes import FakeClient, Harness, PoolingClient, Site, run_site

from penstock.server.settings import ServerSettings


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> FakeClient:
    return FakeClient()


@pytest.fixture
async def api(engine: FakeClient) -> AsyncIterator[Harness]:
    """The application in memory, with default settings."""
    harness = Harness(engine)
    yield harness
    await harness.close()
    assert not engine.live, "a request is alive after its answer"


@pytest.fixture
async def pooling_api() -> AsyncIterator[Harness]:
    """The application in front of an engine that embeds."""
    engine = PoolingClient()
    harness = Harness(engine)
    yield harness
    await harness.close()
    assert not engine.live, "a request is alive after its answer"


@pytest.fixture
async def labels_api() -> AsyncIterator[Harness]:
    """The application in front of an engine that classifies."""
    harness = Harness(PoolingClient(labels=("no", "yes")))
    yield harness
    await harness.close()


@pytest.fixture
async def make_api() -> AsyncIterator[Callable[..., Harness]]:
    """Makes applications with settings of one's own."""
    made: list[Harness] = []

    def make(engine: FakeClient | None = None, **settings: object) -> Harness:
        made.append(Harness(engine or FakeClient(), ServerSettings(**settings)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for harness in made:
        await harness.close()


@pytest.fixture
async def site(engine: FakeClient) -> AsyncIterator[Site]:
    """The application behind a real uvicorn on a free port of loopback."""
    async with run_site(engine, ServerSettings(port=0)) as site:
        yield site

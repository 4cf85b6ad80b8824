"""A real server in a process of its own, and a client for it: what serving benchmarks share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

from penstock.protocol.sse import DONE_DATA, Decoder


class Server(NamedTuple):
    """A server that answers."""

    url: str
    facts: dict[str, Any]  # EngineInfo
    spawned_s: float  # time.perf_counter() when its process was made


@contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    """`penstock serve MODEL` on a free port of loopback, until the block ends."""
    command = [sys.executable, "-m", "penstock.cli.main", "serve", model, "--port", "0", "--json"]
    spawned_s = time.perf_counter()
    with subprocess.Popen(
        [*command, "--log-level", "error", *options], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended with status {process.wait()}")
            facts = json.loads(line)
            yield Server(facts.pop("url"), facts, spawned_s)
        finally:
            process.terminate()


async def stream(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> AsyncIterator[tuple[float, Any]]:
    """POST a streamed completion: (time.perf_counter(), chunk) as the chunks arrive."""
    decoder = Decoder()
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.is_error:
            raise RuntimeError((await response.aread()).decode())
        async for piece in response.aiter_bytes():
            arrived_s = time.perf_counter()
            for event in decoder.push(piece):
                if event.data != DONE_DATA:
                    yield arrived_s, json.loads(event.data)

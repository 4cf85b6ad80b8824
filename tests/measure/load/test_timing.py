"""The issue's acceptance: the timer is right to a millisecond with 200 streams at once.

Both processes read the same clock: the server writes down when it sends a chunk, the client when it
reads it. What lies between is the client's error, the loopback and the scheduler of a busy machine:
so the median decides, with one repeat; the p99 is printed.
"""

from __future__ import annotations

import asyncio
import gc

import pytest
from scripted_server import Scripted

from penstock.measure.load.endpoint import Endpoint
from penstock.measure.load.target import Ask
from penstock.measure.metrics import quantile
from penstock.measure.records import Clock, Request

pytestmark = pytest.mark.anyio

NUM_STREAMS = 200
NUM_TOKENS = 20


async def errors_ms(server: Scripted) -> list[float]:
    """Read time minus send time of every chunk of 200 streams at once."""
    server.configure(ttft_s=0.3, tpot_s=0.05, jitter=0.3)
    target, clock = Endpoint(server.url, model="scripted", probe=False), Clock()
    rows = [Request() for _ in range(NUM_STREAMS)]
    asks = [
        Ask(prompt_id=str(number), prompt=f"p{number}", max_tokens=NUM_TOKENS)
        for number in range(NUM_STREAMS)
    ]
    gc.collect()
    gc.disable()  # as the driver does: a collection is a pause
    try:
        await asyncio.gather(
            *(target.ask(ask, row, clock) for ask, row in zip(asks, rows, strict=True))
        )
    finally:
        gc.enable()
    await target.close()
    sent_ns = {entry["prompt"]: entry["t_sent_ns"] for entry in server.log()}
    assert len(sent_ns) == NUM_STREAMS
    assert all(row.ok for row in rows)
    return [
        (clock.zero_ns + read_ns - its_ns) / 1e6
        for row, ask in zip(rows, asks, strict=True)
        for read_ns, its_ns in zip(row.chunk_t_ns, sent_ns[str(ask.prompt)], strict=True)
    ]


async def test_200_streams(scripted_server: Scripted) -> None:
    errors = await errors_ms(scripted_server)
    if quantile(errors, 0.5) >= 1:
        errors = await errors_ms(scripted_server)
    assert len(errors) == NUM_STREAMS * NUM_TOKENS
    assert min(errors) > 0, "nothing is read before it is sent"
    print(f"median {quantile(errors, 0.5):.3f} ms, p99 {quantile(errors, 0.99):.3f} ms")
    assert quantile(errors, 0.5) < 1


async def test_the_server_itself_keeps_time(scripted_server: Scripted) -> None:
    """What is sent is due at absolute times: a late chunk makes no other one late."""
    scripted_server.configure(ttft_s=0.1, tpot_s=0.01)
    target = Endpoint(scripted_server.url, model="scripted", probe=False)
    row = Request()
    await target.ask(Ask(prompt_id="1", prompt="x", max_tokens=50), row, Clock())
    await target.close()
    (entry,) = scripted_server.log()
    late_ms = [
        (sent_ns - entry["t_received_ns"]) / 1e6 - 100 - 10 * number
        for number, sent_ns in enumerate(entry["t_sent_ns"])
    ]
    assert min(late_ms) > -0.1
    assert quantile(late_ms, 0.5) < 5
    assert quantile(late_ms[-10:], 0.0) < 5, "no drift"


async def test_a_stall_of_the_server_is_in_the_times(scripted_server: Scripted) -> None:
    scripted_server.configure(ttft_s=0.05, tpot_s=0.01)
    target = Endpoint(scripted_server.url, model="scripted", probe=False)
    row = Request()
    scripted_server.stall(after_s=0.1, duration_s=0.3)
    await target.ask(Ask(prompt_id="1", prompt="x", max_tokens=20), row, Clock())
    await target.close()
    gaps_s = [(b - a) / 1e9 for a, b in zip(row.chunk_t_ns, row.chunk_t_ns[1:], strict=False)]
    assert 0.25 < max(gaps_s) < 0.45
    assert sum(gap_s > 0.1 for gap_s in gaps_s) == 1

"""Whether the load generator's client is fast and exact enough to measure with.

The server is the scripted one of the tests, in a process of its own on the second core; the client
has the first core to itself. Three questions: is it late when 1,000 short streamed answers a second
are due (open loop, through the driver that `penstock bench` uses); how much CPU time one takes,
beside the same loop on httpx, in turns; and how far the time of a chunk is from the time
at which the server says that it wrote it, with 200 streams at once.

Reading the last: it holds the server's own write and the loopback, too.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.measure.scripted_server import Scripted, scripted

from benchmarks.common import environment, summary, write
from penstock.measure import metrics
from penstock.measure.load.driver import open_loop
from penstock.measure.load.endpoint import Endpoint
from penstock.measure.load.target import Ask
from penstock.measure.records import Clock, Request
from penstock.measure.run import Writer, new_header
from penstock.protocol.sse import DONE_DATA, Decoder

NUM_TOKENS = 4  # of a short answer
CONCURRENCY = 32
NUM_STREAMS, STREAM_TOKENS = 200, 50
Runner = Callable[[Awaitable[Any]], Any]


def short(number: int) -> Ask:
    return Ask(prompt_id=str(number), prompt="Hi", max_tokens=NUM_TOKENS)


def milliseconds(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """The usual quantiles of seconds, in milliseconds."""
    found = metrics.summarize(values)
    return {
        name: value if name == "n" or value is None else round(1e3 * value, 4)
        for name, value in found.items()
    }


def errors_of(rows: Sequence[Request]) -> int:
    return sum(not row.ok for row in rows)


async def late(server: Scripted, rate: float, duration_s: float) -> dict[str, Any]:
    """Open loop at a constant rate: how late the client was."""
    server.configure(ttft_s=0.0, tpot_s=0.0)
    target = Endpoint(server.url, model="scripted", probe=False)
    num = round(rate * duration_s)
    due_s = [number / rate for number in range(num)]
    with tempfile.TemporaryDirectory() as directory:
        header = new_header("bench", settings={}, arms=[target.arm], environment={})
        with Writer(header, Path(directory)) as writer:
            begin_s, used_s = time.perf_counter(), time.process_time()
            asks = (short(number) for number in itertools.count())
            rows = (await open_loop(target, asks, due_s, writer=writer)).rows
            took_s, used_s = time.perf_counter() - begin_s, time.process_time() - used_s
    await target.close()
    sent_ns = sorted(row.t_sent_ns for row in rows if row.t_sent_ns is not None)
    return {
        "rate_asked_per_s": rate,
        "rate_sent_per_s": (len(sent_ns) - 1) / ((sent_ns[-1] - sent_ns[0]) * 1e-9),
        "num": num,
        "num_errors": errors_of(rows),
        "queue_ms": milliseconds([metrics.queue_s(row) for row in rows]),
        "e2e_ms": milliseconds([metrics.e2e_s(row) for row in rows]),
        "cpu_share_of_a_core": used_s / took_s,
    }


async def ours(server: Scripted, num: int) -> float:
    """Seconds of CPU that `num` short answers take the client, `CONCURRENCY` at once."""
    target, clock = Endpoint(server.url, model="scripted", probe=False), Clock()
    numbers = iter(range(num))
    rows: list[Request] = []

    async def work() -> None:
        for number in numbers:
            rows.append(Request(t_due_ns=clock.now_ns()))
            await target.ask(short(number), rows[-1], clock)

    used_s = time.process_time()
    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    used_s = time.process_time() - used_s
    await target.close()
    assert not errors_of(rows)
    return used_s


async def with_httpx(server: Scripted, num: int) -> float:
    """The same on httpx, with as little around it as gives the same times and counts."""
    numbers = iter(range(num))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    times: list[list[int]] = []
    body = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def work(client: httpx.AsyncClient) -> None:
        for _ in numbers:
            decoder, its = Decoder(), [time.perf_counter_ns()]
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for piece in response.aiter_raw():
                    now_ns = time.perf_counter_ns()
                    for event in decoder.push(piece):
                        if event.data == DONE_DATA:
                            continue
                        choices = json.loads(event.data)["choices"]
                        if choices and choices[0]["delta"].get("content"):
                            its.append(now_ns)
            times.append(its)

    used_s = time.process_time()
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
        await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))
    used_s = time.process_time() - used_s
    assert all(len(its) == NUM_TOKENS + 1 for its in times)
    return used_s


def cost(run: Runner, server: Scripted, num: int, num_rounds: int) -> dict[str, Any]:
    """CPU time of a short answer, ours and httpx's, in turns."""
    server.configure(ttft_s=0.0, tpot_s=0.0)
    samples: dict[str, list[float]] = {"ours": [], "httpx": []}
    for _ in range(num_rounds):
        samples["ours"].append(run(ours(server, num)) / num * 1e6)
        server.configure(ttft_s=0.0, tpot_s=0.0)  # a log that does not grow
        samples["httpx"].append(run(with_httpx(server, num)) / num * 1e6)
        server.configure(ttft_s=0.0, tpot_s=0.0)
    ratios = [theirs / own for own, theirs in zip(samples["ours"], samples["httpx"], strict=True)]
    return {
        "cpu_us_per_answer": {name: summary(values) for name, values in samples.items()},
        "httpx_over_ours": summary(ratios),
    }


async def timer(server: Scripted) -> list[float]:
    """Seconds from the server's write to the client's time, of every chunk of 200 streams."""
    server.configure(ttft_s=0.3, tpot_s=0.02, jitter=0.3)
    target, clock = Endpoint(server.url, model="scripted", probe=False), Clock()
    rows = [Request() for _ in range(NUM_STREAMS)]
    asks = [
        Ask(prompt_id=str(number), prompt=f"p{number}", max_tokens=STREAM_TOKENS)
        for number in range(NUM_STREAMS)
    ]
    await asyncio.gather(*(target.ask(*pair, clock) for pair in zip(asks, rows, strict=True)))
    await target.close()
    sent_ns = {entry["prompt"]: entry["t_sent_ns"] for entry in server.log()}
    return [
        (clock.zero_ns + read_ns - its_ns) * 1e-9
        for ask, row in zip(asks, rows, strict=True)
        for read_ns, its_ns in zip(row.chunk_t_ns, sent_ns[str(ask.prompt)], strict=True)
    ]


def measured(name: str, run: Runner, server: Scripted, options: argparse.Namespace) -> Any:
    """All figures of one event loop."""
    gc.collect()
    gc.disable()
    try:
        streams = [milliseconds(run(timer(server))) for _ in range(options.rounds)]
        return {
            "event_loop": name,
            "open_loop": [run(late(server, rate, options.seconds)) for rate in options.rates],
            "closed_loop": cost(run, server, options.num, options.rounds),
            "timer_error_ms": streams,
        }
    finally:
        gc.enable()


@contextmanager
def on_a_core_each() -> Iterator[Scripted]:
    """The server on the last core, this process on the first, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    try:
        with scripted() as server:
            os.sched_setaffinity(0, {cores[0]})
            yield server
    finally:
        os.sched_setaffinity(0, cores)


def loops() -> dict[str, Runner]:
    """Event loops that are there."""
    found: dict[str, Any] = {"asyncio": asyncio.run}
    try:
        import uvloop
    except ImportError:
        return found
    return found | {"uvloop": uvloop.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", type=float, nargs="*", default=[500, 1000, 1500])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--num", type=int, default=5000, help="answers of a closed loop")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before = environment()
    with on_a_core_each() as server:
        rows = [measured(name, run, server, options) for name, run in loops().items()]
    write("load_client", {"rows": rows}, before)


if __name__ == "__main__":
    main()

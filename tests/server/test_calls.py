"""`Call.interrupt` and `TextWorkers`: the two places where tasks and threads could race."""

from __future__ import annotations

import asyncio
import threading

import pytest
from server_fakes import until

from penstock.server.calls import Call
from penstock.server.failures import DeadlineExceeded, QueueFull
from penstock.server.limits import TextWorkers

pytestmark = pytest.mark.anyio

ERROR = DeadlineExceeded("Too late.")


async def test_an_interrupt_ends_the_block() -> None:
    call = Call("id", "GET", "/")
    asyncio.get_running_loop().call_soon(call.interrupt, ERROR)
    with pytest.raises(DeadlineExceeded):
        async with call.interruptible():
            await asyncio.sleep(10)
    await asyncio.sleep(0)  # and nothing after it


async def test_an_interrupt_before_the_block() -> None:
    call = Call("id", "GET", "/")
    call.interrupt(ERROR)
    call.interrupt(QueueFull("the first one counts", retry_after_s=1))
    with pytest.raises(DeadlineExceeded):
        async with call.interruptible():
            raise AssertionError("the block was entered")


@pytest.mark.parametrize("fails", [False, True])
async def test_an_interrupt_as_the_block_ends_leaves_no_cancellation(fails: bool) -> None:
    """The block is done before the cancellation arrives: what follows must not be cancelled."""
    call = Call("id", "GET", "/")
    try:
        async with call.interruptible():
            call.interrupt(ERROR)  # cancels at the next await, which does not come
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_from_outside_stays_one() -> None:
    call = Call("id", "GET", "/")

    async def block() -> None:
        async with call.interruptible():
            await asyncio.sleep(10)

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    call.interrupt(ERROR)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_waiting_text_work_is_bounded() -> None:
    """A caller that leaves does not free its place before its thread is done."""
    workers = TextWorkers(num_threads=1, max_waiting=1)
    go = threading.Event()
    calls = [asyncio.create_task(workers.run(go.wait)) for _ in range(2)]
    await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    with pytest.raises(QueueFull):
        await workers.run(lambda: True)
    go.set()
    await until(lambda: workers.num_waiting == 0)
    assert await workers.run(lambda: 7) == 7
    workers.close()


async def test_errors_of_text_work_arrive() -> None:
    workers = TextWorkers(num_threads=1, max_waiting=0)

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await workers.run(fail)
    assert workers.num_waiting == 0
    workers.close()

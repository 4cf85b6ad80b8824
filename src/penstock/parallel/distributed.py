"""The ranks of one model as processes of one machine: NCCL between GPUs, gloo between CPUs.

Owns this process's place among the ranks, and how they find one another: through a file in a
directory that is theirs alone, then over the loopback interface or what NCCL finds between the
GPUs. No message is ever unpickled. Everything runs on the current stream and allocates only what it
returns, so that a CUDA graph can capture it.

Invariant: all ranks call the same verbs in the same order with tensors of the same shapes. A rank
that waits for one that is gone, or longer than the timeout, raises `PeerLost`; `abort` ends a wait
from another thread, which is what NCCL needs, because it sees no death.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import final

import torch
import torch.distributed as dist

from penstock.errors import ConfigError, EngineError
from penstock.hardware import num_usable_cores

# Of one name up to torch 2.12, of the other since then.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class PeerLost(EngineError):
    """Another rank is gone or does not answer. Which one, this rank cannot know."""


@final
class Distributed:
    """Implements `Group`. One at a time in a process: torch has one default group."""

    def __init__(
        self, directory: Path, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        """Take this thread's device; `join` meets the others.

        Args:
            directory: where they meet: empty, the same for all, and closed to other users.
            device: this rank's own; all are of one kind.
            timeout_s: how long a rank waits for the others, in `join` and in every verb.

        Raises:
            ConfigError: the process is in a group of torch's own already.
        """
        if dist.is_initialized():
            raise ConfigError(
                "This process is in a group of `torch.distributed` already.",
                hint="run the engine in a process of its own",
            )
        self.rank = rank
        self.size = size
        self.device = device
        self._directory = directory
        self._timeout = timedelta(seconds=timeout_s)
        self._is_closed = False
        self._closing = threading.Lock()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:  # the same number everywhere: what every rank computes is then equal to the last bit
            torch.set_num_threads(max(1, num_usable_cores() // size))
        # gloo raises plain ones; on a GPU those are this rank's own, as of a kernel that failed.
        self._losses = dist.DistError if device.type == "cuda" else RuntimeError

    def join(self) -> None:
        """Wait until all ranks are here. On any thread; a `close` meanwhile does not end it.

        Raises:
            PeerLost: not all came.
        """
        is_on_gpu = self.device.type == "cuda"
        with _on_loopback(), self._losing():
            path = str(self._directory / "ranks")
            store = dist.FileStore(path, self.size)  # type: ignore[attr-defined]
            store.set_timeout(self._timeout)
            dist.distributed_c10d._world.group_count = 0  # names the group; left by one that failed
            dist.init_process_group(
                "nccl" if is_on_gpu else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=self._timeout,
                device_id=self.device if is_on_gpu else None,  # connects now, not in a graph
            )
        if self._is_closed:  # while this waited
            self.close()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; equal to the last bit on all of them."""
        with self._losing():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of each rank to [..., size * n]: joined along the last dimension, by rank."""
        shape, own = x.shape, x.reshape(-1)
        joined = x.new_empty(self.size * own.numel())
        with self._losing():
            _gather(joined, own)
        by_rank = joined.view(self.size, *shape).movedim(0, -2)
        return by_rank.reshape(*shape[:-1], self.size * shape[-1])

    def abort(self) -> None:
        """End whatever waits for another rank; the group is of no use afterwards. Any thread."""
        if dist.is_initialized() and dist.group.WORLD is not None:
            dist.group.WORLD.abort()

    def close(self) -> None:
        """Leave the group; the others need not be there any more."""
        with self._closing:
            self._is_closed = True
            if dist.is_initialized():
                self.abort()
                dist.destroy_process_group()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """What torch raises when another rank is gone, as an error of ours."""
        try:
            yield
        except self._losses as error:
            why = str(error).splitlines()[0]
            raise PeerLost(f"Rank `{self.rank}` lost the others: {why}") from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Who connects meanwhile listens on the loopback interface only."""
    names = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
    wanted = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), names[0]) if names else {}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Run as a program: two and four ranks, forked where torch is imported, each checking every verb.

Every rank can compute what the others hold, so that each checks alone, against float64.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch

from penstock.errors import ConfigError
from penstock.parallel.distributed import Distributed, PeerLost

SHAPES = [(5,), (1, 7), (3, 5), (2, 3, 4), (0, 4), (64, 129)]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def drawn(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check_verbs(group: Distributed) -> None:
    size, rank = group.size, group.rank
    for shape in SHAPES:
        for dtype, tolerance in DTYPES.items():
            all_drawn = [drawn(other, shape, dtype) for other in range(size)]
            own = all_drawn[rank].clone()
            reduced = group.all_reduce(own)
            assert reduced.data_ptr() == own.data_ptr(), "in place"
            wanted = sum(x.double() for x in all_drawn)
            torch.testing.assert_close(
                reduced.double(), wanted, rtol=tolerance, atol=size * tolerance
            )
            gathered = group.all_gather(all_drawn[rank])
            assert gathered.dtype == dtype
            assert torch.equal(gathered, torch.cat(all_drawn, -1))
            if math.prod(shape):  # sums are the same bits on every rank
                each = group.all_gather(reduced).unflatten(-1, (size, shape[-1]))
                assert torch.equal(each, reduced.unsqueeze(-2).expand_as(each))
    turned = torch.arange(6.0).view(2, 3).T + 100 * rank  # not contiguous
    assert torch.equal(
        group.all_gather(turned),
        torch.cat([torch.arange(6.0).view(2, 3).T + 100 * other for other in range(size)], -1),
    )


def check_listens_on_loopback_only() -> None:
    """By the sockets of this process that /proc/net lists as listening (state 0A)."""
    inodes = {os.readlink(fd)[8:-1] for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
    found = 0
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                assert local.split(":")[0] in {"0100007F", "0" * 24 + "01000000"}, local
                found += 1
    assert found, "gloo listens nowhere"


def reduce_thrice(group: Distributed) -> None:
    """A rank that has no connection to the one that ended learns of it from its neighbours."""
    for _ in range(3):
        group.all_reduce(torch.ones(1000))


def check_loss(group: Distributed) -> None:
    """The last rank ends without a word; all others notice."""
    group.all_reduce(torch.ones(1))
    if group.rank == group.size - 1:
        os._exit(0)
    started_s = time.monotonic()
    with pytest.raises(PeerLost, match=f"Rank `{group.rank}` lost the others"):
        reduce_thrice(group)
    assert time.monotonic() - started_s < 5


def run(rank: int, size: int, directory: Path) -> None:
    before = dict(os.environ)
    group = Distributed(directory, rank, size, torch.device("cpu"), 20.0)
    group.join()
    assert dict(os.environ) == before
    assert (group.rank, group.size) == (rank, size)
    with pytest.raises(ConfigError, match="already"):  # a second one in the same process
        Distributed(directory, rank, size, torch.device("cpu"), 20.0)
    check_verbs(group)
    check_listens_on_loopback_only()
    if size > 2:
        check_loss(group)
    group.close()
    group.close()  # no harm


def main(size: int, directory: Path) -> int:
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            signal.alarm(40)
            try:
                run(rank, size, directory)
            except BaseException:  # noqa: BLE001 - it must not return into the parent's code
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    return int(any(os.waitpid(pid, 0)[1] for pid in pids))


if __name__ == "__main__":
    sys.exit(any(main(size, Path(tempfile.mkdtemp(dir=sys.argv[1]))) for size in (2, 4)))

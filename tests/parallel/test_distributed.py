"""The verbs of a group: alone, and between real processes over gloo."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from penstock.parallel.distributed import Distributed, PeerLost
from penstock.parallel.group import Alone, Group

PROGRAM = Path(__file__).parent / "helpers_verbs.py"


def test_one_rank_changes_nothing() -> None:
    group: Group = Alone()
    x = torch.arange(6.0).view(2, 3)
    assert (group.rank, group.size) == (0, 1)
    assert group.all_reduce(x) is x
    assert group.all_gather(x) is x


def test_the_verbs_between_processes(tmp_path: Path) -> None:
    arguments = ["-W", "error", str(PROGRAM), str(tmp_path)]
    subprocess.run([sys.executable, *arguments], check=True, timeout=60)


def test_a_rank_that_nobody_joins_gives_up(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(PeerLost, match="Rank `1` lost the others"):
        Distributed(tmp_path, 1, 2, torch.device("cpu"), 0.5).join()
    assert time.monotonic() - started_s < 10
    assert not torch.distributed.is_initialized()


def test_a_group_that_is_closed_before_all_are_there(tmp_path: Path) -> None:
    """Who waited with it has given up; what comes of it late is closed too."""
    group = Distributed(tmp_path, 0, 2, torch.device("cpu"), 20.0)
    waiting = threading.Thread(target=group.join)
    waiting.start()
    group.close()
    program = f"""
import os
from pathlib import Path
import torch
from penstock.parallel.distributed import Distributed
Distributed(Path({str(tmp_path)!r}), 1, 2, torch.device("cpu"), 20.0).join()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    waiting.join(20)
    assert not waiting.is_alive()
    assert not torch.distributed.is_initialized()

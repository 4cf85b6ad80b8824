"""Runs to list, verify and compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.measure import kinds
from penstock.measure.records import Arm, Header, Request
from penstock.measure.run import Writer, runs_dir

MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of runs."""
    monkeypatch.setenv("PENSTOCK_RUNS", str(tmp_path / "runs"))
    return runs_dir()


def row(index: int, **more: Any) -> Request:
    """A request that is sent every 10 ms and takes 100 ms and a little more each time."""
    sent = index * 10_000_000
    told: dict[str, Any] = {
        "arm": "a",
        "index": index,
        "prompt_id": str(index),
        "t_due_ns": sent - 1_000_000,
        "t_sent_ns": sent,
        "t_first_ns": sent + 50_000_000,
        "t_last_ns": sent + 95_000_000,
        "t_done_ns": sent + 100_000_000 + index * 1_000_000,
        "n_in": 7,
        "n_out": 10,
        "count_source": "usage",
    }
    return Request(**(told | more))


@pytest.fixture
def make_run(runs: Path) -> MakeRun:
    """Writes a run of the kind `import` with rows, and its figures unless `finish=False`."""

    def make(
        run_id: str = "20261122T100000-import-abc123",
        *,
        rows: list[Request] | None = None,
        finish: bool = True,
        **more: Any,
    ) -> Path:
        told: dict[str, Any] = {
            "kind": "import",
            "started_at": "2026-11-22T10:00:00Z",
            "version": "0.1.0",
            "settings": {"format": "guidellm", "has_timeline": True},
            "arms": [Arm(name="a", target="http://h", model="llama", engine="vllm")],
        }
        with Writer(Header(run_id=run_id, **(told | more))) as writer:
            for one in rows if rows is not None else [row(index) for index in range(20)]:
                writer.add(one)
        if finish:
            kinds.finish(writer.path)
        return writer.path

    return make

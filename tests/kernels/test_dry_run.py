"""Every launch of the kernels' samples, and of engines, compiles for Hopper with its arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_launch_compiles(request: pytest.FixtureRequest) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PENSTOCK_KERNELS"] = "reference"  # lets the backend run without a GPU
    # What has not changed since the last run is not compiled again.
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("helpers_dry_run.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == []
    assert len(found["launched"]) >= 10
    assert sum(found["launched"].values()) > 300

"""Every kernel compiles for the GPUs we name, and neither spills nor asks for too much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that one thread block may have


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_all_kernels_compile_into_registers(
    capability: int, request: pytest.FixtureRequest
) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    # What has not changed since the last run is not compiled again.
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("helpers_compile.py")), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results
    problems = []
    for result in results:
        label, spilled, shared = (result[key] for key in ("label", "spilled", "shared"))
        if spilled:
            problems.append(f"{label} spills {spilled} bytes")
        if shared > SHARED_BYTES[capability]:
            problems.append(f"{label} wants {shared} bytes of shared memory")
        if not result["is_fenced"]:
            problems.append(f"{label} may count a program before what it leaves is written")
        if capability == 90 and result["wants_wgmma"] and not result["wgmma"]:
            problems.append(f"{label} multiplies without warp groups")
        if label.startswith("sample ") and not result["loads_16_bytes"]:
            problems.append(f"{label} loads less than 16 bytes of logits at once")
    assert problems == []

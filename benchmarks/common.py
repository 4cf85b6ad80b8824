"""What every benchmark shares: the environment, statistics, and the results file.

A results file holds the command, hardware, versions, commit and raw samples beside each figure, so
that a figure can be recomputed. The last line on stdout is the same JSON document.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from penstock import hardware

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PACKAGES = ("penstock", "torch", "numpy", "transformers", "uvicorn", "starlette", "msgspec")


def environment() -> dict[str, Any]:
    """Hardware and versions of this run."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks")),
        "cpu": hardware.cpu_name(),
        "cpu_features": hardware.cpu_features(),
        "num_cores": hardware.num_usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1m": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of samples."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "n": len(samples),
    }


def write(
    name: str, figures: dict[str, Any], environment_: dict[str, Any], directory: Path = RESULTS
) -> Path:
    """Write <directory>/<name>.json and print it as one line."""
    document = {
        "benchmark": name,
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "environment": environment_,
        "figures": figures,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return path


def commit() -> str:
    """What is checked out; PENSTOCK_COMMIT says it where this is a copy without git."""
    return os.environ.get("PENSTOCK_COMMIT") or _git("rev-parse", "--short", "HEAD") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

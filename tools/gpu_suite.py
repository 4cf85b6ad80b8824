"""`make test-gpu`: the tests that tell something on a GPU, on whatever torch and Triton are there.

Each test file runs in a process of its own: an illegal access spoils a whole CUDA context, and a
hang must not cost the other files. Files that compile many kernels run side by side, those that
measure memory or time one by one. One line is appended to `results/gpu-tests.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]  # neither is installed where this runs

from benchmarks.common import RESULTS, commit, environment  # noqa: E402
from benchmarks.gpu import machine  # noqa: E402
from benchmarks.gpu.processes import end_on_term, run  # noqa: E402
from tools.gpu_report import VARIABLE  # noqa: E402

BUDGET_S = 200.0
FILE_LIMIT_S = 120.0
TOO_LATE_S = 5.0
# What tells something on a GPU. Patterns, so that a new file of a kind is found.
TOGETHER = (
    "tests/kernels/test_*.py",
    "tests/attention/test_paged*.py",
    "tests/attention/test_flashinfer*.py",
    "tests/sampling/test_device*.py",
    "tests/quantization/test_device*.py",
    "tests/layers/test_device*.py",
    "tests/models/test_device*.py",
    "tests/models/test_graphs*.py",
    "tests/engine/test_device*.py",
)
ALONE = ("tests/gpu/test_*.py",)
# Versions are not pinned there: what they warn of is told, and fails nothing.
PYTEST = ("-p", "no:cacheprovider", "-p", "tools.gpu_report", "-W", "default", "--tb=short", "-q")


class Counts(NamedTuple):
    """What became of the tests of some files."""

    passed: int
    failed: int
    skipped: int
    failures: list[str]

    @classmethod
    def of(cls, reports: Sequence[Path]) -> Counts:
        """Count what the plugin noted. A test that began and did not end has failed."""
        outcomes: dict[str, str] = {}
        for path in reports:
            for line in path.read_text().splitlines() if path.exists() else ():
                noted = json.loads(line)
                test, outcome = noted["test"], noted["outcome"]
                if outcomes.get(test) != "failed":  # a test whose end fails has failed
                    outcomes[test] = outcome
        failures = sorted(test for test, end in outcomes.items() if end in {"failed", "began"})
        ends = list(outcomes.values())
        return cls(ends.count("passed"), len(failures), ends.count("skipped"), failures)


def files(patterns: Sequence[str], root: Path = ROOT) -> list[Path]:
    """The test files of some patterns."""
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def run_file(path: Path, report: Path, environment_: dict[str, str], deadline_s: float) -> None:
    """Run one file; whatever happens is in its report."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    limit_s = min(FILE_LIMIT_S, deadline_s - time.monotonic())
    if limit_s < TOO_LATE_S:
        _note(report, f"{name} (no time was left)")
        say(f"{name}: no time was left")
        return
    log = report.with_suffix(".log")
    lines: list[str] = []
    ended = run(
        [sys.executable, "-m", "pytest", *PYTEST, str(path)],
        environment=environment_ | {VARIABLE: str(report)},
        log=log,
        limit_s=limit_s,
        on_line=lines.append,
        directory=ROOT,
    )
    counts = Counts.of([report])
    is_told = counts.failed or (ended.problem or "").startswith("ended with status 5")
    if ended.problem is not None and not is_told:  # it died between tests, or before the first
        _note(report, f"{name} ({ended.problem})")
    if ended.problem is not None:
        say("\n".join([*lines, log.read_text(errors="replace").strip()]))
    told = f"{counts.passed} passed, {counts.failed} failed, {counts.skipped} skipped"
    say(f"{name}: {told}, {ended.seconds:.0f} s{f'; {ended.problem}' if ended.problem else ''}")


def run_all(
    together: Sequence[Path],
    alone: Sequence[Path],
    variables: dict[str, str],
    budget_s: float,
    num_workers: int,
) -> Counts:
    """Run the files within the budget; those that are to be alone last."""
    deadline_s = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory() as scratch:
        paths = [*together, *alone]
        reports = {path: Path(scratch, f"{n}.jsonl") for n, path in enumerate(paths)}
        for some, workers in ((together, num_workers), (alone, 1)):
            with ThreadPoolExecutor(workers) as pool:
                done = [
                    pool.submit(run_file, path, reports[path], variables, deadline_s)
                    for path in some
                ]
            for one in done:
                one.result()
        return Counts.of(list(reports.values()))


def _note(report: Path, test: str) -> None:
    with report.open("a") as file:
        file.write(json.dumps({"test": test, "outcome": "failed"}) + "\n")


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


def line_of(facts: dict[str, Any], counts: Counts, seconds: float) -> dict[str, Any]:
    """What is kept of a run."""
    known = environment()
    names = ("device", "driver", "torch", "triton", "python")
    return {
        "time": known["time"],
        "commit": commit(),
        "dirty": known["dirty"],
        **{name: facts[name] for name in names},
        **counts._asdict(),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for all tests together")
    parser.add_argument("--workers", type=int, help="files that run side by side")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the line")
    options = parser.parse_args()
    end_on_term()
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        facts = machine.ask(sys.executable, variables)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        say(str(error))
        return 1
    if isinstance(facts, str):
        say(f"{facts} `make test` runs what can be tested without one.")
        return machine.NO_GPU
    started_s = time.monotonic()
    num_workers = options.workers or max(1, min(4, (os.cpu_count() or 1) // 2))
    say(f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}")
    counts = run_all(files(TOGETHER), files(ALONE), variables, options.seconds, num_workers)
    line = line_of(facts, counts, time.monotonic() - started_s)
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / "gpu-tests.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return 1 if counts.failed or not counts.passed else 0


if __name__ == "__main__":
    sys.exit(main())

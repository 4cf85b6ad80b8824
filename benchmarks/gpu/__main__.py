"""Every GPU benchmark, the most telling first, each in its own process, within a budget of seconds.

A benchmark that fails, hangs or would begin too late is told in `gpu-run.json` and in the table at
the end; the others go on. `--toy` runs them at a size that a CPU computes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, environment
from benchmarks.gpu import lengths, machine
from benchmarks.gpu.peers import LIMIT_S
from benchmarks.gpu.processes import end_on_term, run
from benchmarks.gpu.record import PROGRESS, REFERENCE, Options, parse, parser

BUDGET_S = 270.0
TOO_LATE_S = 15.0  # with less time left no benchmark is begun


class Benchmark(NamedTuple):
    """One process."""

    name: str
    module: str
    arguments: tuple[str, ...]
    limit_s: float
    takes: tuple[str, ...] = ()  # which of the driver's own options are passed on


def _of(model: str) -> tuple[str, ...]:
    return ("--model", model)


PEER_OPTIONS = ("lengths", "limit", "vllm_site", "sglang_site")
BENCHMARKS = (
    Benchmark("engine-llama-3.2-1b", "engine", _of("llama-3.2-1b"), 60),
    Benchmark("engine-llama-3.1-8b", "engine", _of("llama-3.1-8b"), 90),
    Benchmark("engine-qwen3-0.6b", "engine", _of("qwen3-0.6b"), 60),
    Benchmark("kernels", "kernels", (), 90),
    Benchmark("trace-llama-3.2-1b", "trace", _of("llama-3.2-1b"), 60, ("lengths",)),
    Benchmark("prefix-llama-3.2-1b", "prefix", _of("llama-3.2-1b"), 60),
    Benchmark("peers-llama-3.2-1b", "peers", _of("llama-3.2-1b"), 600, PEER_OPTIONS),
    Benchmark("formats-weights-llama-3.1-8b", "formats", ("weights", *_of("llama-3.1-8b")), 180),
    Benchmark("formats-kv-llama-3.2-1b", "formats", ("kv", *_of("llama-3.2-1b")), 120),
    Benchmark("trace-llama-3.1-8b", "trace", _of("llama-3.1-8b"), 180, ("lengths",)),
)


def chosen(options: Options) -> list[Benchmark]:
    """What to run, in order; at toy size one shape stands for all."""
    found = [one for one in BENCHMARKS if options.only is None or one.name in options.only]
    if options.toy:
        by_kind = {(one.module, one.arguments[:1]): one for one in reversed(found)}
        found = [one for one in found if one in by_kind.values()]
    return found


def arguments_of(one: Benchmark, options: Options) -> list[str]:
    """The command line of a benchmark."""
    found = [*one.arguments, "--results", str(options.results), *(["--toy"] * options.toy)]
    for name in one.takes:
        if (value := getattr(options, name)) is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def run_all(
    benchmarks: Sequence[tuple[Benchmark, list[str]]],
    environment_: dict[str, str],
    logs: Path,
    budget_s: float,
) -> list[dict[str, Any]]:
    """Run them in order within the budget: a row for each, with the problem it had, if any."""
    deadline_s = time.monotonic() + budget_s
    rows = []
    for number, (one, arguments) in enumerate(benchmarks, 1):
        left_s = deadline_s - time.monotonic()
        head = f"[{number}/{len(benchmarks)}, {left_s:.0f} s left] {one.name}"
        if left_s < TOO_LATE_S:
            rows.append({"name": one.name, "seconds": 0.0, "problem": "no time was left"})
            say(f"{head}: no time was left")
            continue
        say(head)
        log = logs / f"{one.name}.log"
        ended = run(
            [sys.executable, "-m", f"benchmarks.gpu.{one.module}", *arguments],
            environment=environment_,
            log=log,
            limit_s=min(one.limit_s, left_s),
            on_line=lambda line: say(line) if line.startswith(PROGRESS) else None,
            directory=ROOT,
        )
        rows.append({"name": one.name, "seconds": ended.seconds, "problem": ended.problem})
        if ended.problem is not None:
            say(f"  {ended.problem} (log: {log})")
    return rows


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=BUDGET_S, help="for all benchmarks together")
    names = [one.name for one in BENCHMARKS]
    made.add_argument("--only", nargs="*", choices=names, metavar="NAME", help=", ".join(names))
    made.add_argument("--lengths", type=Path, help=f"CSV with {' and '.join(lengths.COLUMNS)}")
    made.add_argument("--vllm-site", type=Path, help="directory that vLLM was installed into")
    made.add_argument("--sglang-site", type=Path, help="directory that SGLang was installed into")
    made.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one peer engine")
    options = parse(made)
    end_on_term()
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    facts: dict[str, Any] = {}
    if options.toy:
        variables |= REFERENCE
    else:
        try:
            found = machine.ask(sys.executable, variables)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            say(str(error))
            return 1
        if isinstance(found, str):
            say(f"{found} `--toy` tries the benchmarks on the CPU.")
            return machine.NO_GPU
        facts = found
    started_s = time.monotonic()
    todo = [(one, arguments_of(one, options)) for one in chosen(options)]
    logs = Path(tempfile.mkdtemp(prefix="penstock-gpu-"))
    rows = run_all(todo, variables, logs, options.seconds)
    options.results.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": "gpu-run",
        "toy": options.toy,
        "environment": environment() | {"gpu": facts},
        "seconds": time.monotonic() - started_s,
        "benchmarks": rows,
    }
    (options.results / "gpu-run.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        say(f"{row['name']:32} {row['seconds']:6.1f} s  {row['problem'] or 'ok'}")
    say(f"{document['seconds']:.0f} s; results in {options.results}")
    return 1 if any(row["problem"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

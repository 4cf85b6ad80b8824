"""penstock and other engines on the same GPU: the same shapes, lengths and questions.

Each engine has a process of its own, one after the other, so that each has all of the memory. An
engine that is not there has a row that says so. vLLM and SGLang are found where Python finds them,
or in directories of their own (`pip install --target DIR`), which go in front of the path of that
one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu import lengths, shapes
from benchmarks.gpu.processes import end_on_term, run
from benchmarks.gpu.record import REFERENCE, Options, Record, figure, parse, parser
from benchmarks.gpu.workers.worker import Job

ENGINES = ("penstock", "transformers", "vllm", "sglang")
UNIT = "tokens/s"
LIMIT_S = 120.0  # of one engine; vLLM and SGLang may want more to compile


def job_of(options: Options, directory: Path, taken: lengths.Lengths) -> Job:
    """What all engines are asked."""
    toy = options.toy
    return Job(
        directory=str(directory),
        vocab_size=shapes.spec(options.shape).vocab_size,
        toy=toy,
        batches=(1, 2) if toy else (1, 64, 256),
        context=16 if toy else 512,
        num_steps=4 if toy else 64,
        prefills=(32,) if toy else (2048, 16384),
        num_rounds=2 if toy else 3,
        requests=tuple(taken.requests),
        max_num_seqs=2 if toy else 256,
        max_num_batched_tokens=32 if toy else 8192,
        max_model_len=128 if toy else 20480,
    )


def environment_of(engine: str, sites: dict[str, Path], toy: bool) -> dict[str, str]:
    """The variables of an engine's process."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if engine in sites:
        paths.insert(0, str(sites[engine].resolve()))
    told = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **told, **(REFERENCE if toy else {})}


def missing(engine: str, environment: dict[str, str]) -> str | None:
    """Why an engine cannot be measured; None if it is there."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({engine!r}) is None)"
    command = [sys.executable, "-c", code]
    if subprocess.run(command, env=environment, check=False, cwd="/").returncode:
        return f"{engine} is not installed"
    return None


def measure(
    options: Options,
    taken: lengths.Lengths,
    engines: Sequence[str],
    sites: dict[str, Path],
    limit_s: float,
) -> int:
    """All engines on one shape: the number of failures, without those that are not there."""
    num_failed = 0
    with (
        Record(f"peers-{options.shape}", options) as record,
        shapes.directory(options.shape) as directory,
        tempfile.TemporaryDirectory() as scratch,
    ):
        job = Path(scratch, "job.json")
        job.write_text(json.dumps(dataclasses.asdict(job_of(options, directory, taken))))
        record.add("lengths", taken.source)
        for engine in engines:
            environment = environment_of(engine, sites, options.toy)
            if reason := missing(engine, environment):
                record.add(engine, {"error": reason})
                continue
            rows: dict[str, Any] = {}

            def take(text: str, engine: str = engine, rows: dict[str, Any] = rows) -> None:
                line = json.loads(text)
                if "error" in line:
                    rows["error"] = line["error"]
                else:
                    rows[line["name"]] = _row(line["value"])
                record.add(engine, rows)

            ended = run(
                [sys.executable, "-m", f"benchmarks.gpu.workers.{engine}", str(job)],
                environment=environment,
                log=Path(scratch, f"{engine}.log"),
                limit_s=limit_s,
                on_line=take,
                directory=ROOT,
            )
            if ended.problem is not None:
                num_failed += 1
                record.add(engine, {"error": ended.problem} | rows)
        _compare(record)
    return num_failed


def _row(value: dict[str, Any]) -> dict[str, Any]:
    if "samples" not in value:
        return value
    return figure(value.pop("samples"), UNIT, **value)


def _compare(record: Record) -> None:
    """penstock's medians over those of each other engine."""
    ours = record.figures.get("penstock", {})
    found = {
        f"{name} over {engine}": value["median"] / theirs[name]["median"]
        for engine, theirs in record.figures.items()
        if engine in ENGINES and engine != "penstock"
        for name, value in ours.items()
        if "median" in value and "median" in theirs.get(name, {})
    }
    record.add("ratios", found)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    made.add_argument("--vllm-site", type=Path, help="directory that vLLM was installed into")
    made.add_argument("--sglang-site", type=Path, help="directory that SGLang was installed into")
    made.add_argument("--lengths", type=Path, help=f"CSV with {' and '.join(lengths.COLUMNS)}")
    made.add_argument("--requests", type=int, default=1000, help="of the trace")
    made.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one engine")
    options = parse(made)
    sites = {
        engine: site
        for engine, site in (("vllm", options.vllm_site), ("sglang", options.sglang_site))
        if site is not None
    }
    end_on_term()
    taken = lengths.take(options.requests, options.lengths)
    if options.toy:
        taken = lengths.Lengths([(5, 3), (9, 2), (3, 4)], "three tiny ones")
    return 1 if measure(options, taken, options.engines, sites, options.limit) else 0


if __name__ == "__main__":
    sys.exit(main())

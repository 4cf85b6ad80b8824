"""brook in bfloat16 against brook in int8, and in int4: `penstock compare` on this machine.

Quality on all held-out items of brook, speed in interleaved blocks, memory, energy (modelled: the
watts are given), cost by an hourly price, and the divergence of the distributions. Keeps figures,
header and page as `results/verdict-brook-<format>.json` and `.html`. The run's directory stays, so
that `--again RUN` makes figures and page of its records anew, without measuring.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.common import RESULTS, ROOT, environment
from penstock.measure.engines.arms import parse_arms
from penstock.measure.kinds import finish
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.quality import suites
from penstock.measure.run import PAGE, Figures, Run, runs_dir
from penstock.measure.verdict.run import run
from penstock.measure.verdict.settings import LoadSettings, RuleSettings

# An assumption, printed with every figure: 360 W of a Zen 4 EPYC of 192 threads, 2 of them.
CPU_WATTS = 3.75
ABOUT = "benchmark.json"  # in a run's directory: which format, when and how it was measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--formats", nargs="*", default=["int8", "int4"], help="of the variant's weights")
    add("--base", default="brook", help="the base")
    add("--limit", type=int, help="items; default: all")
    add("--blocks", type=int, default=6, help="of load, A B B A")
    add("--max-blocks", type=int, default=18, help="while speed cannot be told")
    add("--noise-blocks", type=int, default=4, help="of the base against itself")
    add("--requests", type=int, default=32, help="in each leg")
    add("--output-tokens", type=int, default=128, help="of each answer under load")
    add("--concurrency", type=int, default=4, help="requests at a time")
    add("--max-drop", type=float, default=1.0, help="points of quality that may be lost")
    add("--cpu-watts", type=float, default=CPU_WATTS, help="of this machine when busy: assumed")
    add("--usd-per-hour", type=float, default=0.10, help="of this machine: assumed")
    add("--results", type=Path, default=RESULTS, help="where results go")
    add("--runs", type=Path, default=runs_dir(), help="where the runs' directories are kept")
    add(
        "--again",
        type=Path,
        nargs="*",
        default=[],
        help="runs whose records are used: no measuring",
    )
    return parser.parse_args()


def measure(options: argparse.Namespace, weights: str) -> Path:
    """One comparison; returns its run's directory."""
    base, variant = parse_arms(
        [f"bf16={options.base}", f"{weights}={options.base}?quantization={weights}"]
    )
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    about = {
        "format": weights,
        "command": " ".join(["python -m benchmarks.verdict", *sys.argv[1:]]),
        "environment": environment(),
    }
    directory: Path = options.runs / f"{stamp}-verdict-brook-{weights}"
    directory.mkdir(parents=True)
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    path, _ = run(
        (base, variant),
        [suites.find("brook")],
        load=LoadSettings(
            limit=options.limit,
            blocks=options.blocks,
            max_blocks=max(options.max_blocks, options.blocks),
            noise_blocks=options.noise_blocks,
            requests=options.requests,
            random_output_len=options.output_tokens,
            concurrency=options.concurrency,
        ),
        rules=RuleSettings(max_drop=options.max_drop),
        meters=MeterSettings(cpu_watts=options.cpu_watts, usd_per_hour=options.usd_per_hour),
        directory=directory,
        progress=lambda line: print(line, file=sys.stderr),
    )
    return path


def keep(path: Path, made: Figures, results: Path) -> None:
    """Write results of a run's directory: figures, header and page."""
    about = json.loads((path / ABOUT).read_bytes())
    document = {
        "benchmark": "verdict",
        "command": about["command"],
        "environment": about["environment"],
        "figures": {
            "header": msgspec.to_builtins(Run(path).header),
            "records_sha256": made.records_sha256,
            "num_records": made.num_records,
            "problems": made.problems,
            **made.figures,
        },
    }
    results.mkdir(parents=True, exist_ok=True)
    name = f"verdict-brook-{about['format']}"
    for suffix, text in (
        ("html", (path / PAGE).read_text()),
        ("json", json.dumps(document, indent=1) + "\n"),
    ):  # where it was run is nobody's business
        (results / f"{name}.{suffix}").write_text(text.replace(f"{ROOT}/", ""))
    print(made.figures["overall"]["sentence"], file=sys.stderr)
    told = {"benchmark": "verdict", "format": about["format"], "run": str(path)}
    print(json.dumps(told | {"problems": made.problems} | made.figures["overall"]))


def main() -> int:
    options = arguments()
    paths = options.again or (measure(options, weights) for weights in options.formats)
    for path in paths:
        keep(path, finish(path), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

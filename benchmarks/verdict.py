"""brook in bfloat16 against brook in int8, and in int4: `penstock compare` on this machine.

Quality on all held-out items of brook, speed in interleaved blocks, memory, energy (modelled: the
watts are given), cost by an hourly price, and the divergence of the distributions. Keeps figures,
header and page as `results/verdict-brook-<format>.json` and `.html`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import RESULTS, ROOT, environment
from penstock.measure.engines.arms import parse_arms
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.quality import suites
from penstock.measure.run import PAGE, Run
from penstock.measure.verdict.run import run
from penstock.measure.verdict.settings import LoadSettings, RuleSettings

# An assumption, printed with every figure: 360 W of a Zen 4 EPYC of 192 threads, 2 of them.
CPU_WATTS = 3.75


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
    return parser.parse_args()


def compare(options: argparse.Namespace, weights: str) -> dict[str, Any]:
    """One comparison; writes its page and returns what goes into the results."""
    base, variant = parse_arms(
        [f"bf16={options.base}", f"{weights}={options.base}?quantization={weights}"]
    )
    with tempfile.TemporaryDirectory() as work:
        path, made = run(
            (base, variant),
            [suites.find("brook")],
            load=LoadSettings(
                limit=options.limit,
                blocks=options.blocks,
                max_blocks=max(options.max_blocks, options.blocks),
                noise_blocks=options.noise_blocks,
                requests=options.requests,
                output_tokens=options.output_tokens,
                concurrency=options.concurrency,
            ),
            rules=RuleSettings(max_drop=options.max_drop),
            meters=MeterSettings(cpu_watts=options.cpu_watts, usd_per_hour=options.usd_per_hour),
            directory=Path(work) / "run",
            progress=lambda line: print(line, file=sys.stderr),
        )
        header = msgspec.to_builtins(Run(path).header)
        page = (path / PAGE).read_text()
    options.results.mkdir(parents=True, exist_ok=True)
    page = page.replace(f"{ROOT}/", "")  # where it was run is nobody's business
    (options.results / f"verdict-brook-{weights}.html").write_text(page)
    return {
        "header": header,
        "records_sha256": made.records_sha256,
        "num_records": made.num_records,
        "problems": made.problems,
        **made.figures,
    }


def main() -> int:
    options = arguments()
    for weights in options.formats:
        before = environment()
        figures = compare(options, weights)
        document = {
            "benchmark": "verdict",
            "command": " ".join(["python -m benchmarks.verdict", *sys.argv[1:]]),
            "environment": before,
            "figures": figures,
        }
        path = options.results / f"verdict-brook-{weights}.json"
        path.write_text(json.dumps(document, indent=1).replace(f"{ROOT}/", "") + "\n")
        print(figures["overall"]["sentence"], file=sys.stderr)
        print(json.dumps({"benchmark": "verdict", "format": weights, **figures["overall"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""penstock against llama.cpp, vLLM, OpenVINO GenAI and transformers on this machine's CPU.

Builds checkpoints of random weights in real shapes, installs each engine in an environment of its
own, loads all engines of a precision at once and measures them in turn. Writes peers.json and a
plot for each model; a table goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, environment, write
from benchmarks.peers import ceiling
from benchmarks.peers.cells import Cell, all_titles, cells
from benchmarks.peers.environments import RECIPES, InstallFailed, install
from benchmarks.peers.protocol import Options
from benchmarks.peers.report import Row, merged, plot, rows, table
from benchmarks.peers.rounds import Samples, Slot, measure, say
from benchmarks.peers.shapes import SHAPES, write_checkpoint

PRECISIONS = ("bf16", "int8", "int4")
MAX_LEN = 8192
MAX_SEQUENCES = 64
MAX_BATCHED_TOKENS = 2048
KV_BYTES = 1 << 30
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "penstock-peers"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = list(cells(quick=False))
    add = parser.add_argument
    add("--engines", type=_some(RECIPES), default=list(RECIPES), help=_help("engines", RECIPES))
    add("--precisions", type=_some(PRECISIONS), default=PRECISIONS, help=_help("all", PRECISIONS))
    add("--models", type=_some(SHAPES), help=_help("shapes", SHAPES))
    add("--cells", type=_some(names), help=_help("what is measured", names))
    add("--rounds", type=int, help="samples of each cell; by default 3, or 1 with --quick")
    patience = "an engine that has spent this many seconds in a cell gives no more samples"
    add("--patience", type=float, default=60.0, metavar="SECONDS", help=patience)
    quick = "the small model, one round, short answers, no context of 4096, no 64 requests"
    add("--quick", action="store_true", help=quick)
    threads = "threads of each engine, on as many cores"
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help=threads)
    work_dir = "checkpoints and environments; about 25 GB, kept for the next run"
    add("--work-dir", type=Path, default=CACHE, help=work_dir)
    pip_args = "for every install, such as an index of CPU builds of torch"
    add("--pip-args", default=os.environ.get("PIP_ARGS", ""), help=pip_args)
    results = "where peers.json and the plots go; by default results/, or --work-dir with --quick"
    add("--results", type=Path, help=results)
    keep = "keep the rows of an earlier peers.json that this run does not measure anew"
    add("--keep", action="store_true", help=keep)
    penstock = "an option of penstock's EngineConfig beside those of the benchmark; repeatable"
    add("--penstock", action="append", default=[], metavar="NAME=VALUE", help=penstock)
    return parser.parse_args()


def _some(allowed: Any) -> Any:
    """A parser of a comma-separated choice."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if wrong := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{wrong[0]} is none of {', '.join(allowed)}")
        return chosen

    return parse


def _help(what: str, allowed: Any) -> str:
    return f"{what}, separated by commas, of {', '.join(allowed)}"


def _value(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _chosen(options: argparse.Namespace) -> tuple[list[str], dict[str, Cell], int]:
    """Models, cells and number of rounds."""
    known = cells(quick=options.quick)
    left_out = {"decode-4096", "batch-64"} if options.quick else set()
    names = options.cells or [name for name in known if name not in left_out]
    models = options.models or (["smollm2-135m"] if options.quick else list(SHAPES))
    rounds = options.rounds or (1 if options.quick else 3)
    return models, {name: cell for name, cell in known.items() if name in names}, rounds


def _interpreters(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each engine, and why there is none."""
    found, failed = {}, {}
    for engine in options.engines:
        try:
            found[engine] = install(
                engine, options.work_dir / "environments", options.pip_args.split()
            )
        except InstallFailed as error:
            failed[engine] = f"not installed: {error}"
            say(f"{engine}: {failed[engine]}")
    return found, failed


def _slots(
    options: argparse.Namespace, model: str, precision: str, interpreters: dict[str, Path]
) -> list[Slot]:
    """The engines that have this precision."""
    shape = SHAPES[model]
    checkpoint = write_checkpoint(shape, options.work_dir / "checkpoints")
    cores = sorted(os.sched_getaffinity(0))
    extra = {
        name: _value(value) for name, _, value in (text.partition("=") for text in options.penstock)
    }
    return [
        Slot(
            engine,
            python,
            cores,
            Options(
                checkpoint=str(checkpoint),
                directory=str(options.work_dir / "prepared" / f"{model}-{engine}-{precision}"),
                precision=precision,
                group=shape.quantization_group,
                num_threads=options.threads,
                max_len=MAX_LEN,
                max_num_seqs=MAX_SEQUENCES,
                max_batched_tokens=MAX_BATCHED_TOKENS,
                kv_bytes=KV_BYTES,
                vocab_size=shape.vocab_size,
                extra=extra if engine == "penstock" else {},
            ),
        )
        for engine, python in interpreters.items()
        if precision in RECIPES[engine].precisions
    ]


def _ceilings_of(options: argparse.Namespace) -> dict[str, float] | None:
    try:
        return ceiling.measure(options.work_dir, sorted(os.sched_getaffinity(0)))
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"no ceiling: {error}")
        return None


def main() -> int:
    options = arguments()
    before = environment()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    models, chosen, num_rounds = _chosen(options)
    interpreters, not_installed = _interpreters(options)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    rates = []
    measured: dict[tuple[str, str], Samples] = {}
    for model in models:
        for precision in options.precisions:
            say(f"== {model} {precision}")
            rates.append(_ceilings_of(options))
            slots = _slots(options, model, precision, interpreters)
            samples = measure(slots, chosen, num_rounds, options.patience)
            for engine in not_installed:
                if precision in RECIPES[engine].precisions:
                    samples.fail("startup", engine, not_installed[engine])
            measured[model, precision] = samples
    rates.append(_ceilings_of(options))
    known_rates = [one for one in rates if one is not None]
    found = _all_rows(options, chosen, measured, known_rates)
    run = {
        "time": before["time"],
        "commit": before["commit"],
        "quick": options.quick,
        "rounds": num_rounds,
        "threads": options.threads,
        "ceilings_measured": known_rates,
        "versions": {e: v for one in measured.values() for e, v in one.versions.items()},
    }
    results = options.results or (options.work_dir if options.quick else RESULTS)
    runs, found = merged(run, found, results / "peers.json" if options.keep else None)
    write("peers", {"runs": runs, "rows": found}, before, results)
    titles = all_titles(quick=options.quick)
    models = list(dict.fromkeys(row["model"] for row in found))
    for model in models:
        rows_of_model = [row for row in found if row["model"] == model]
        plot(model, rows_of_model, titles, results / f"peers-{model}.png")
    print(table(found, titles), file=sys.stderr)
    return 0


def _all_rows(
    options: argparse.Namespace,
    chosen: dict[str, Cell],
    measured: dict[tuple[str, str], Samples],
    rates: list[dict[str, float]],
) -> list[Row]:
    batches = {name: cell.batch for name, cell in chosen.items() if cell.batch is not None}
    found: list[Row] = []
    for (model, precision), samples in measured.items():
        limits = {}
        if rates:
            limits = ceiling.ceilings(SHAPES[model], precision, ceiling.machine(rates), batches)
        found += rows(model, precision, chosen, options.engines, samples, limits)
    return found


if __name__ == "__main__":
    sys.exit(main())

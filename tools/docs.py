"""Writes the generated parts of the documents: figures, and the options of `penstock serve`.

`python tools/docs.py` writes; with `--check` it only tells whether they are up to date. A test runs
the check, so that a figure in the README is always one of `results/`.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


def figures() -> str:
    """The README's table, from the files in results/."""
    rows = [row for make in (_startup, _overhead, _prefix_cache, _concurrent) for row in make()]
    table = ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]
    return "\n".join([*table, "", _conditions()])


def options() -> str:
    """The table of `penstock serve`'s options."""
    from penstock.cli.serve import command

    lines = ["| option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            flags = " / ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
            lines.append(f"| {flags} | {_default(parameter)} | {parameter.help or ''} |")
    return "\n".join(lines)


def backends() -> str:
    """Which backend has what: the table by which the engine refuses."""
    from penstock.engine.backends import NAMES
    from penstock.engine.config import DTYPES, KV_CACHE_DTYPES
    from penstock.quantization import schemes

    several = {  # settings, and a value that is not what everybody has
        "dtype": DTYPES[1:],
        "quantization": schemes.NAMES,
        "kv_cache_dtype": KV_CACHE_DTYPES[1:],
        "tensor_parallel_size": (2,),
        "async_scheduling": (True,),
        "enforce_eager": (True,),
        "attention_backend": ("flashinfer",),
        "gpu_memory_utilization": (0.9,),
        "num_threads": (2,),
        "weight_cache": ("PATH",),
    }
    lines = [f"| | {' | '.join(NAMES)} |", "|---|" + "---|" * len(NAMES)]
    for name, values in several.items():
        flag = f"--{name.replace('_', '-')}"
        for value in values:
            setting = f"`{flag}`" if value is True else f"`{flag} {value}`"
            cells = [_had(backend, name, value) for backend in NAMES]
            lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _had(backend: str, name: str, value: Any) -> str:
    """Whether a backend has a value: whatever it computes in, only with one of these, or not."""
    from penstock.engine.backends import has
    from penstock.engine.config import DTYPES

    dtypes = has(backend, "bfloat16").get("dtype", DTYPES[1:])
    having = [dtype for dtype in dtypes if value in has(backend, dtype).get(name, (value,))]
    if len(having) == len(dtypes):
        return "yes"
    return "as `--dtype` only" if having else ""


def quantization() -> str:
    """What each number format costs on brook: results/quantization.json."""
    lines = [
        "| weights (activations, KV cache) | bits a weight | KL to float32, nats | same top token "
        "| brook's tasks |",
        "|---|---|---|---|---|",
    ]
    for row in _load("quantization")["figures"]["formats"]:
        name = row["dtype"] if row["quantization"] == "none" else row["quantization"]
        tasks = row["tasks"]
        lines.append(
            f"| {name} ({row['dtype']}, KV {row['kv_cache_dtype']}) | {_BITS[name]} "
            f"| {row['kl_nats_mean']:.1e} | {row['same_top_token']:.2%} "
            f"| {tasks['score']:.1%} ({tasks['low']:.1%} to {tasks['high']:.1%}) |"
        )
    return "\n".join(lines)


_BITS = {
    "float32": "32",
    "bfloat16": "16",
    "int8": "8",
    "int8-a16": "8",
    "int4": "4.125",
    "int4-a16": "4.125",
    "int4-g128": "4.125, tables 8",
    "int4-g128-a16": "4.125, tables 8",
}


def formats() -> str:
    """What each format takes and brings: results/formats.json."""
    if not (RESULTS / "formats.json").exists():
        return "Not measured yet."
    document = _load("formats")
    lines = [
        "| model, format, engine | weights, MiB | load, s | decode 1, tok/s | decode 8 "
        "| prompt of 512 |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["figures"]["rows"]:
        cells = [f"{row['shape']}, {row['format']}, {row['engine']}"]
        cells.append(f"{row['weight_mib']:.0f}" if "weight_mib" in row else "")
        if "failed" in row:
            lines.append(f"| {' | '.join(cells)} | failed | | | |")
            continue
        cells.append(f"{row['load_s']['median']:.2f}")
        for figure in ("decode_1_tok_s", "decode_8_tok_s", "prefill_512_tok_s"):
            ratio = row.get(f"{figure}_over_bf16")
            told = f" ({ratio['median']:.2f}x)" if ratio else ""
            cells.append(f"{row[figure]['median']:.1f}{told}")
        lines.append(f"| {' | '.join(cells)} |")
    environment, rounds = document["environment"], document["figures"]["rounds"]
    return "\n".join(
        [
            *lines,
            "",
            f"{environment['cpu']}, {environment['num_cores']} cores. Medians of {rounds} rounds; "
            "in brackets the ratio to bf16 in the same round.",
        ]
    )


def peers() -> str:
    """The comparison with other engines: results/peers.json."""
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed
    from benchmarks.peers import cells, report

    return report.table(_load("peers")["figures"]["rows"], cells.all_titles(quick=False))


def measuring() -> str:
    """What measuring itself costs and how exact it is: results/load_client.json."""
    rows = {row["event_loop"]: row for row in _load("load_client")["figures"]["rows"]}
    lines = ["| the load generator's client, one core | asyncio | uvloop |", "|---|---|---|"]
    rates = [run["rate_asked_per_s"] for run in rows["uvloop"]["open_loop"]]
    for index, rate in enumerate(rates):
        cells = []
        for row in rows.values():
            queue = row["open_loop"][index]["queue_ms"]
            cells.append(f"{queue['p50']:.2f} / {queue['p99']:.2f} ms")
        lines.append(f"| late at {rate:,} requests/s (median / p99) | {' | '.join(cells)} |")
    errors = [
        " / ".join(
            f"{statistics.median(run[mark] for run in row['timer_error_ms']):.2f}"
            for mark in ("p50", "p99")
        )
        for row in rows.values()
    ]
    cells = [f"{error} ms" for error in errors]
    lines.append(f"| timer error at 200 streams (median / p99) | {' | '.join(cells)} |")
    costs = [row["closed_loop"]["cpu_us_per_answer"]["ours"]["median"] for row in rows.values()]
    ratios = [row["closed_loop"]["httpx_over_ours"]["median"] for row in rows.values()]
    cells = [f"{cost:.0f} us; {ratio:.1f}x" for cost, ratio in zip(costs, ratios, strict=True)]
    lines.append(f"| CPU time of a short streamed answer; httpx takes | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts() -> str:
    """brook in bfloat16 against its formats: results/verdict-brook-*.json."""
    lines = ["| brook in bf16 against | verdict |", "|---|---|"]
    for name in ("int8", "int4"):
        overall = _load(f"verdict-brook-{name}")["figures"]["overall"]
        lines.append(f"| {name} | {overall['sentence']} |")
    return "\n".join(lines)


def engines() -> str:
    """Our server beside other engines' over HTTP: results/engines.json."""
    from penstock.measure.engines.page import cell_text

    figures = _load("engines")["figures"]
    names = list(figures["arms"])
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in figures["rows"]:
        if row["figure"] not in SHOWN_OF_ENGINES:
            continue
        cells = [
            cell_text(row["arms"][name], row["unit"], is_first=name == figures["first"])
            for name in names
        ]
        what = f"{row['stage']}: {SHOWN_OF_ENGINES[row['figure']]}"
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN_OF_ENGINES = {
    "total_s": "process made to first token",
    "ttft_s": "time to first token",
    "decode_tokens_per_s": "decode",
    "output_tokens_per_s": "output",
    "total_tokens_per_s": "input and output",
    "peak_rss_bytes": "peak resident",
}


def gpu() -> str:
    """What was measured on a GPU, and what still waits for one: results/gpu-*.json."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu import report

    return report.text(RESULTS)


def _default(parameter: click.Option) -> str:
    value = parameter.default
    if value in (None, (), "") or value is getattr(click.core, "UNSET", None):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def _startup() -> list[tuple[str, str]]:
    rows = _load("startup")["figures"]["rows"]
    what = "start of `penstock serve` to the first streamed token"
    help_ms = _load("cli_help")["figures"]["help_s"]["median"] * 1e3
    return [
        *((f"{what}: {row['name']}", _seconds(row["phases"]["first_token_s"])) for row in rows),
        ("`penstock --help`", f"{help_ms:.0f} ms"),
    ]


def _seconds(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} s"


def _overhead() -> list[tuple[str, str]]:
    rows = _load("engine_overhead")["figures"]["rows"]

    def step_ms(num_running: int, kind: str) -> str:
        (row,) = (
            row
            for row in rows
            if (row["vocab_size"], row["num_running"], row["kind"]) == (2048, num_running, kind)
        )
        return f"{row['step_us']['median'] / 1e3:.2f}"

    numbers = (1, 16, 64, 256)
    title = (
        "engine overhead a step (all but the model) at 1 / 16 / 64 / 256 running, vocabulary 2,048"
    )
    return [
        (f"{title}, greedy", " / ".join(step_ms(n, "greedy") for n in numbers) + " ms"),
        (
            "the same, sampling with a temperature",
            " / ".join(step_ms(n, "temperature") for n in numbers) + " ms",
        ),
    ]


def _prefix_cache() -> list[tuple[str, str]]:
    cold, warm = _load("prefix_cache")["figures"]["rows"]
    cost, low, high = (
        (cold["seconds_with_over_without"][name] - 1) * 100 for name in ("median", "min", "max")
    )
    gain = 1 / warm["seconds_with_over_without"]["median"]
    return [
        (
            "prefix cache, nothing ever found: time against no cache",
            f"{cost:+.1f} % (rounds from {low:+.1f} to {high:+.1f} %)",
        ),
        (
            f"prefix cache, {warm['hit_rate']:.0%} of prompt tokens found: throughput against none",
            f"{gain:.2f}x",
        ),
    ]


def _concurrent() -> list[tuple[str, str]]:
    measured = _load("concurrent")["figures"]
    throughput = measured["throughput_ratio"]["median"]
    ttft = measured["median_ttft_ratio"]["median"]
    what = f"16 clients, brook in {measured['dtype']}, against transformers' `generate` in batches"
    return [
        (f"{what}: output tokens/s", f"{throughput:.2f}x"),
        (f"{what}: median time to first token", f"{ttft:.2f}x"),
    ]


def _conditions() -> str:
    environment = _load("startup")["environment"]
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['num_cores']} cores, "
        f"{environment['memory_gib']:.0f} GiB; "
        f"Python {environment['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}. Medians; spread, samples and commands are in "
        "`results/`. Again: `make bench`."
    )


def architectures() -> str:
    """Which architectures there are, by the file that reads them."""
    from penstock.models.architectures import ARCHITECTURES, POOLING_ARCHITECTURES

    lines = ["| | `architectures` in config.json |", "|---|---|"]
    for kind, table in (("", ARCHITECTURES), (" (pooled)", POOLING_ARCHITECTURES)):
        for file in sorted(set(table.values())):
            path = ROOT / "src/penstock/models/architectures" / f"{file}.py"
            told = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
            names = ", ".join(f"`{name}`" for name in sorted(table) if table[name] == file)
            lines.append(f"| {told.rstrip('.')}{kind} | {names} |")
    return "\n".join(lines)


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "architectures": ("docs/models.md", architectures),
    "figures": ("README.md", figures),
    "options": ("docs/serving.md", options),
    "backends": ("docs/gpu.md", backends),
    "quantization": ("docs/cpu.md", quantization),
    "peers": ("README.md", peers),
    "gpu": ("docs/gpu-benchmarks.md", gpu),
    "measuring": ("docs/measure/client.md", measuring),
    "verdicts": ("README.md", verdicts),
    "engines": ("README.md", engines),
    "formats": ("docs/formats.md", formats),
}


def filled(name: str) -> tuple[Path, str, str]:
    """A document, its text now, and its text with the part `name` made anew."""
    file, make = PARTS[name]
    path = ROOT / file
    text = path.read_text()
    pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)"
    new = re.sub(pattern, lambda match: f"{match[1]}{make()}\n{match[2]}", text, flags=re.DOTALL)
    assert re.search(pattern, text, re.DOTALL), f"{file} has no part {name}"
    return path, text, new


def main() -> int:
    stale = []
    for name in PARTS:
        path, text, new = filled(name)
        if text != new:
            stale.append(f"{path.name}: {name}")
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run tools/docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The documents' words on what was measured on a GPU, and on what still waits for one.

Owns the list of what is wanted, with its aims. Knows the results files and nothing that computes:
it needs neither torch nor a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS


class Wanted(NamedTuple):
    """A figure that the documents tell."""

    title: str
    file: str  # results/gpu-<file>.json
    path: tuple[str, ...]  # to the figure within its `figures`
    share: str = ""  # the key of a fraction beside the figure
    aim: str = ""


_COPY, _PRODUCT = "fraction_of_copy_bandwidth", "fraction_of_matmul_rate"
_SHAPES = {
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen3-0.6b": "Qwen3-0.6B (stand-in)",
}


def _of_engine(shape: str, name: str) -> list[Wanted]:
    file = f"engine-{shape}"
    decodes = [
        Wanted(
            f"{name}, decode, {batch} request{'s' * (batch > 1)}",
            file,
            (f"decode-{batch}",),
            _COPY,
            "85 %" if batch == 1 else "",
        )
        for batch in (1, 64, 256)
    ]
    prefills = [
        Wanted(f"{name}, prefill of {length:,}", file, (f"prefill-{length}",), _PRODUCT, "60 %")
        for length in (2048, 16384)
    ]
    aim = "under 200 us" if shape == "qwen3-0.6b" else ""
    host = [
        Wanted(
            f"{name}, host's work a step, 64 requests", file, ("overhead-64", "host_us"), "", aim
        ),
        Wanted(f"{name}, device idle between steps", file, ("overhead-64", "idle_us")),
    ]
    start = Wanted(f"{name}, start-up without reading weights", file, ("startup",))
    return [*decodes, *prefills, *host, start]


_TRACE = "1,000 requests of the conversation trace"
_PREFIX = ("prefix-llama-3.2-1b", "seconds_with_over_without")
WANTED = [
    *(wanted for shape, name in _SHAPES.items() for wanted in _of_engine(shape, name)),
    *(
        Wanted(f"{_SHAPES[shape]}, {_TRACE}", f"trace-{shape}", ("throughput", "total"))
        for shape in ("llama-3.2-1b", "llama-3.1-8b")
    ),
    *(
        Wanted(
            f"Llama-3.2-1B, prefix cache, {share} shared: time against none",
            _PREFIX[0],
            (f"shared-{share}", _PREFIX[1]),
        )
        for share in ("0%", "90%")
    ),
    *(
        Wanted(
            f"Llama-3.1-8B, weights in {name}, decode, 1 request",
            "formats-weights-llama-3.1-8b",
            (name, "decode-1"),
            _COPY,
        )
        for name in ("int8-a16", "int4-a16", "fp8")
    ),
    *(
        Wanted(
            f"Llama-3.2-1B, keys and values in {name}, decode, 64 requests of 4,096",
            "formats-kv-llama-3.2-1b",
            (name, "decode-64"),
            _COPY,
        )
        for name in ("int8", "fp8")
    ),
    *(
        Wanted(
            f"attention alone, {name}",
            "kernels",
            (f"attention {name}",),
            _PRODUCT if "prefill" in name else _COPY,
        )
        for name in (
            "decode, 1 x 16384, bfloat16",
            "decode, 64 x 2048, bfloat16",
            "prefill, 16384 of 16384",
        )
    ),
    *(
        Wanted(f"Llama-3.2-1B against {engine}, decode, 64 requests", "peers-llama-3.2-1b", path)
        for engine in ("transformers", "vllm", "sglang")
        for path in [("ratios", f"decode-64 over {engine}")]
    ),
]


def text(results: Path = RESULTS) -> str:
    """A table of what was measured, and a list of what was not."""
    found = [(wanted, _figure(results, wanted)) for wanted in WANTED]
    rows = [(wanted, figure) for wanted, figure in found if figure is not None]
    waiting = [wanted.title for wanted, figure in found if figure is None]
    lines = []
    if rows:
        lines += ["| what | figure | aim |", "|---|---|---|"]
        lines += [
            f"| {wanted.title} | {_told(wanted, figure)} | {wanted.aim} |"
            for wanted, figure in rows
        ]
        lines += ["", _conditions(results), ""]
    if waiting:
        lines += ["Not yet measured, for want of a GPU or of time on one:", ""]
        lines += [f"- {title}" for title in waiting]
    lines += ["", _tests(results)]
    return "\n".join(lines)


def _figure(results: Path, wanted: Wanted) -> Any:
    """A figure of a results file; None where there is none."""
    file = results / f"gpu-{wanted.file}.json"
    if not file.exists():
        return None
    value: Any = json.loads(file.read_text())["figures"]
    for step in wanted.path:
        value = value.get(step) if isinstance(value, dict) else None
    return None if isinstance(value, dict) and "median" not in value else value


def _told(wanted: Wanted, figure: Any) -> str:
    if not isinstance(figure, dict):
        return f"{figure:.2f}x"
    median, unit = figure["median"], figure["unit"]
    if unit == "ratio":
        return f"{median:.2f}x"
    number = f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
    share = ""
    if wanted.share:
        ceiling = "copy bandwidth" if wanted.share == _COPY else "rate of a product"
        share = f", {figure[wanted.share]:.0%} of the {ceiling}"
    return f"{number} {unit}{share}"


def _conditions(results: Path) -> str:
    """Where the figures are from: each file's device and commit, told once."""
    told: dict[str, None] = {}
    for file in sorted(results.glob("gpu-*.json")):
        known = json.loads(file.read_text())["environment"]
        gpu = known["gpu"]
        versions = f"torch {gpu['torch']}, Triton {gpu['triton']}"
        told[f"{gpu['device']}, driver {gpu['driver']}, {versions}, commit {known['commit']}"] = (
            None
        )
    return "; ".join(told) + ". Medians; samples, spread and ceilings are in `results/gpu-*.json`."


def _tests(results: Path) -> str:
    """The last line of the GPU suite."""
    file = results / "gpu-tests.jsonl"
    if not file.exists():
        return "The GPU suite has not run on a GPU yet (`results/gpu-tests.jsonl` is not there)."
    last = json.loads(file.read_text().splitlines()[-1])
    return (
        f"The GPU suite ran last at {last['time']}, commit {last['commit']}, on {last['device']}: "
        f"{last['passed']} passed, {last['failed']} failed, {last['skipped']} skipped."
    )

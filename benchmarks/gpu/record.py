"""What a benchmark is told, and the file that it writes as it goes.

Owns the options that all have in common and the results file. A file is written anew after every
figure, so that a benchmark that hangs or is stopped loses only what it had not measured;
`finished` says whether it came to its end. A figure holds its samples beside its median.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from benchmarks.common import RESULTS, environment, summary
from benchmarks.gpu import machine, shapes

TOY_RESULTS = Path(tempfile.gettempdir(), "penstock-benchmarks", "gpu-toy")
# What toy size computes with: on a CPU, and without threads that would only wait for one another.
REFERENCE = {"PENSTOCK_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
PROGRESS = "  "  # how a line on stdout begins that tells a figure as it comes
_SHARE = "fraction_of_"  # how a figure's share of a ceiling is called
Figure = dict[str, Any]


class Options(argparse.Namespace):
    """What every benchmark is told."""

    model: str
    toy: bool
    results: Path

    @property
    def shape(self) -> str:
        """The shape to measure: at toy size there is one."""
        return "toy" if self.toy else self.model


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--toy", action="store_true", help="tiny sizes on the CPU: does it work?")
    made.add_argument("--results", type=Path, help="directory; default: results/, toy: elsewhere")
    names = [name for name in shapes.CONFIGS if name != "toy"]
    made.add_argument("--model", choices=names, default="llama-3.2-1b", help="shape to measure")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> Options:
    """Read the options; at toy size the references compute, on the CPU."""
    options = made.parse_args(arguments, namespace=Options())
    options.results = options.results or (TOY_RESULTS if options.toy else RESULTS)
    if options.toy:
        os.environ.update(REFERENCE)
    return options


def figure(samples: Sequence[float], unit: str, **facts: Any) -> Figure:
    """A figure: its median and spread, its samples, and what else belongs to it."""
    return {"unit": unit, **summary(samples), "samples": list(samples), **facts}


class Record:
    """The results of one benchmark: a file that grows.

    Args:
        name: of the benchmark, and of the file behind `gpu-`.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.shape = options.shape
        self.path = options.results / f"gpu-{name}.json"
        self.document: dict[str, Any] = {
            "benchmark": name,
            "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
            "toy": options.toy,
            "model": options.shape,
            "finished": False,
            "environment": environment() | ({} if options.toy else {"gpu": machine.facts()}),
            "figures": {},
        }
        if note := shapes.NOTES.get(options.shape):
            self.document["note"] = note

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        if kind is None:
            self.document["finished"] = True
            self._write()
            print(json.dumps(self.document))

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured, by name."""
        found: dict[str, Any] = self.document["figures"]
        return found

    @property
    def num_failed(self) -> int:
        """How many figures have an error in their place."""
        return sum("error" in value for value in self.figures.values() if isinstance(value, dict))

    def add(self, name: str, value: Any) -> None:
        """Put a figure into the file."""
        self.figures[name] = value
        self._write()
        print(f"{PROGRESS}{name}: {_short(value)}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[Callable[[Any], None]]:
        """Measure one figure: the block is given what takes it; what it raises stands instead."""
        try:
            yield lambda value: self.add(name, value)
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()  # one figure's failure is its row, not the end of the others
            self.add(name, {"error": " ".join(f"{type(error).__name__}: {error}".split())})

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.document, indent=1) + "\n")
        unfinished.replace(self.path)


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else sys.argv[0]


def _short(value: Any) -> str:
    """A figure in a line, or the figures that an entry is made of."""
    if not isinstance(value, dict):
        return str(value) if isinstance(value, str | int | float) else f"{len(value)} lines"
    if "error" in value:
        return f"failed: {value['error']}"
    if "median" in value:
        shares = [f"{key} {share:.1%}" for key, share in value.items() if key.startswith(_SHARE)]
        return ", ".join([f"{value['median']:.4g} {value['unit']}", *shares])
    told = [
        f"{name} {inner['median']:.4g} {inner['unit']}"
        for name, inner in value.items()
        if isinstance(inner, dict) and "median" in inner
    ]
    return ", ".join(told) or f"{len(value)} entries"

"""The operations alone: how near each comes to what limits it.

Each is timed as a graph that goes round several sets of inputs, so that its inputs come from device
memory and not from the L2 cache, and the host is out of the way; attention of prompts, whose plan
belongs to the host, as single launches. A case counts the bytes that must move (inputs read once,
outputs written once) and the operations; it reports microseconds, GB/s, TFLOP/s and the share of
the nearer ceiling. Shapes are those of Llama-3.1-8B.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.device import Call, Device, ceilings, release
from benchmarks.gpu.engine import Rates, rates_of
from benchmarks.gpu.kernel_cases import (
    Case,
    attention_cases,
    elementwise_cases,
    matmul_cases,
    sampling_cases,
)
from benchmarks.gpu.record import Figure, Options, Record, figure, parse, parser


class Sizes(NamedTuple):
    """How much is measured."""

    decodes: tuple[tuple[int, int, str], ...]  # requests, context, type of keys and values
    prefills: tuple[tuple[int, int], ...]  # new tokens, context with them
    samples: tuple[int, ...]  # rows of logits
    tokens: tuple[int, ...]  # of the operations on each token
    formats: tuple[str, ...]  # of the weights of a product
    products: tuple[int, ...]  # tokens that the largest matrix is multiplied with
    few_products: tuple[int, ...]  # and the others
    num_runs: int


GPU = Sizes(
    decodes=(
        (1, 1024, "bfloat16"),
        (1, 16384, "bfloat16"),
        (64, 2048, "bfloat16"),
        (256, 1024, "bfloat16"),
        (64, 4096, "int8"),
        (64, 4096, "fp8"),
    ),
    prefills=((2048, 2048), (16384, 16384), (2048, 16384)),
    samples=(1, 64, 256),
    tokens=(1, 256, 8192),
    formats=("none", "int8-a16", "int4-a16", "fp8", "fp8-block"),
    products=(1, 16, 64, 512, 4096),
    few_products=(1, 64),
    num_runs=20,
)
TOY = Sizes(
    decodes=((2, 20, "bfloat16"), (2, 20, "int8")),
    prefills=((8, 12),),
    samples=(2,),
    tokens=(2,),
    formats=("none", "int8-a16"),
    products=(2,),
    few_products=(1,),
    num_runs=2,
)


def case_figure(case: Case, device: Device, rates: Rates, num_runs: int) -> Figure:
    """Microseconds of one call, and what they mean."""
    num_sets = device.num_sets(case.set_bytes) if case.is_captured else 1
    calls: list[Call] = list(case.make(num_sets))
    seconds = (
        device.per_call(calls, num_runs) if case.is_captured else device.timed(calls[0], num_runs)
    )
    found = figure([1e6 * one for one in seconds], "us", num_sets=len(calls))
    median_s = found["median"] / 1e6
    found["gb_s"] = case.num_bytes / median_s / 1e9
    found["fraction_of_copy_bandwidth"] = case.num_bytes / median_s / rates.bytes
    if case.flops:
        found["tflop_s"] = case.flops / median_s / 1e12
        found["fraction_of_matmul_rate"] = case.flops / median_s / rates.flops
    return found | {"bytes": case.num_bytes, "flops": case.flops}


def all_cases(device: torch.device, shape: str, sizes: Sizes) -> Iterator[tuple[str, Any]]:
    """Name and case; a case is made when it is its turn."""
    spec = shapes.spec(shape)
    yield from attention_cases(device, spec, sizes.decodes, sizes.prefills)
    yield from sampling_cases(device, spec, sizes.samples)
    yield from elementwise_cases(device, spec, sizes.tokens)
    yield from matmul_cases(device, spec, sizes.formats, sizes.products, sizes.few_products)


def measure(options: Options, sizes: Sizes) -> int:
    """All cases: the number of figures that failed."""
    device = Device(toy=options.toy)
    with Record("kernels", options) as record, torch.inference_mode():
        measured = ceilings(device)
        record.add("ceilings", measured)
        rates = rates_of(measured)
        for name, case in all_cases(device.torch, options.shape, sizes):
            with record.attempt(name) as add:
                add(case_figure(case, device, rates, sizes.num_runs))
            release(device)
        return record.num_failed


def main() -> int:
    made = parser(__doc__)
    made.set_defaults(model="llama-3.1-8b")
    options = parse(made)
    return 1 if measure(options, TOY if options.toy else GPU) else 0


if __name__ == "__main__":
    sys.exit(main())

"""One shape through the whole engine: start-up, decode, prefill, and the host's share of a step.

Decode: all requests have the same context and decode at once; a sample is a window of steps. Its
time is held against the bytes that the step must read at the copy bandwidth. Prefill: one prompt,
alone, from its submission to its first token, against its operations at the rate of a large bf16
product. Both ceilings are measured here, in the same process.
"""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import roofline, shapes, steps
from benchmarks.gpu.device import Device, ceilings, release
from benchmarks.gpu.engines import config_of, decode, engine, plan_of, prompts, timed
from benchmarks.gpu.record import Figure, Options, Record, figure, parse, parser
from penstock.engine.core import EngineCore
from penstock.engine.memory import MemoryPlan
from penstock.models.spec import ModelSpec
from penstock.quantization.schemes import NONE


class Sizes(NamedTuple):
    """How much is measured."""

    batches: tuple[int, ...]
    context: int
    num_windows: int
    window: int  # steps
    prefills: dict[int, int]  # tokens of a prompt -> samples
    overheads: tuple[int, ...]  # requests that run
    num_steps: int  # whose overhead is taken
    max_num_batched_tokens: int
    max_model_len: int


GPU = Sizes((1, 64, 256), 512, 8, 16, {2048: 7, 16384: 3}, (1, 64, 256), 64, 8192, 20480)
TOY = Sizes((1, 3), 20, 2, 2, {40: 2}, (2,), 3, 32, 256)


class Rates(NamedTuple):
    """Ceilings that were measured, per second."""

    bytes: float
    flops: float


def rates_of(measured: dict[str, Figure]) -> Rates:
    """The medians of `ceilings`."""
    copy, product = measured["copy_gb_s"], measured["matmul_tflop_s"]
    return Rates(copy["median"] * 1e9, product["median"] * 1e12)


def decode_figure(
    core: EngineCore,
    spec: ModelSpec,
    rates: Rates,
    batch: int,
    sizes: Sizes,
    quantization: str = NONE,
) -> Figure:
    """Output tokens a second of `batch` requests, with the shares of both ceilings."""
    work = prompts(random.Random(batch), batch, sizes.context, spec.vocab_size)
    settled = decode(core, work, num_windows=sizes.num_windows, window=sizes.window)
    context = settled.context
    num_bytes = roofline.decode_bytes(
        spec,
        batch=batch,
        context=context,
        quantization=quantization,
        kv_dtype=core.info.kv_cache_dtype,
    )
    flops = roofline.decode_flops(spec, batch=batch, context=context)
    found = figure([batch / seconds for seconds in settled.step_s], "tokens/s")
    step_s = batch / found["median"]
    return found | {
        "batch": batch,
        "context": context,
        "bytes_a_step": num_bytes,
        "flops_a_step": flops,
        "fraction_of_copy_bandwidth": num_bytes / step_s / rates.bytes,
        "fraction_of_matmul_rate": flops / step_s / rates.flops,
    }


def prefill_figure(
    core: EngineCore, spec: ModelSpec, rates: Rates, length: int, num_samples: int
) -> Figure:
    """Prompt tokens a second of one prompt, with the share of the rate of a matrix product."""
    rng = random.Random(length)
    works = [prompts(rng, 1, length, spec.vocab_size) for _ in range(num_samples + 1)]
    samples = [length / timed(core, [(prompt, 1)]) for (prompt,) in works][1:]
    found = figure(samples, "tokens/s")
    flops = roofline.prefill_flops(spec, length)
    achieved = flops * found["median"] / length
    return found | {
        "prompt_tokens": length,
        "flops": flops,
        "tflop_s": achieved / 1e12,
        "fraction_of_matmul_rate": achieved / rates.flops,
    }


def memory_figures(plan: MemoryPlan, device: Device, free_bytes: int) -> dict[str, Any]:
    """What was planned, and what was taken since `free_bytes` were free; the CPU is not asked."""
    planned = {name: getattr(plan, name) for name in plan.__slots__ if name.endswith("_bytes")}
    found: dict[str, Any] = {"planned": planned, "lines": list(plan.lines)}
    if device.is_gpu:
        found["taken_bytes"] = free_bytes - device.free_bytes
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["taken_over_planned"] = found["taken_bytes"] / plan.total_bytes
    return found


def measure(options: Options, sizes: Sizes) -> int:
    """Everything about one shape: the number of figures that failed."""
    device = Device(toy=options.toy)
    settings = {
        "max_num_seqs": max(sizes.batches),
        "max_num_batched_tokens": sizes.max_num_batched_tokens,
        "max_model_len": sizes.max_model_len,
        "num_blocks": 64 if options.toy else None,
    }
    with Record(f"engine-{options.shape}", options) as record:
        measured = ceilings(device)
        record.add("ceilings", measured)
        release(device)
        free_bytes = device.free_bytes
        with shapes.directory(options.shape) as path:
            plan = plan_of(config_of(path, **settings))
        with engine(options.shape, **settings) as core:
            phases = dict(core.info.startup_s)
            record.add("startup", figure([sum(phases.values())], "s", phases=phases))
            figures_of(core, record, device, rates_of(measured), sizes)
            record.add("memory", memory_figures(plan, device, free_bytes))
        return record.num_failed


def figures_of(
    core: EngineCore, record: Record, device: Device, rates: Rates, sizes: Sizes
) -> None:
    """What one engine gives: decode, prefill, and where the time of a step goes."""
    spec = shapes.spec(record.shape)
    for batch in sizes.batches:
        with record.attempt(f"decode-{batch}") as add:
            add(decode_figure(core, spec, rates, batch, sizes))
    for length, num_samples in sizes.prefills.items():
        with record.attempt(f"prefill-{length}") as add:
            add(prefill_figure(core, spec, rates, length, num_samples))
    prompt_len = min(128, sizes.context)
    for num_running in sizes.overheads:
        with record.attempt(f"overhead-{num_running}") as add:
            add(
                steps.overhead(
                    core,
                    device,
                    num_running=num_running,
                    prompt_len=prompt_len,
                    num_steps=sizes.num_steps,
                )
            )


def main() -> int:
    options = parse(parser(__doc__))
    return 1 if measure(options, TOY if options.toy else GPU) else 0


if __name__ == "__main__":
    sys.exit(main())

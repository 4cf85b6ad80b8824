"""Decode in other number formats: of the weights, or of keys and values.

Each format is an engine of its own, loaded after the one before is gone, and measured as in
`engine.py`. The bytes of its roofline are those that the format leaves.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu import engine as whole
from benchmarks.gpu import shapes
from benchmarks.gpu.device import Device, ceilings, release
from benchmarks.gpu.engines import engine
from benchmarks.gpu.record import Options, Record, parse, parser
from penstock.models.spec import ModelSpec
from penstock.quantization.schemes import NONE

Settings = dict[str, str]
FORMATS: dict[str, dict[str, Settings]] = {
    "weights": {name: {"quantization": name} for name in ("none", "int8-a16", "int4-a16", "fp8")},
    "kv": {name: {"kv_cache_dtype": name} for name in ("bfloat16", "int8", "fp8")},
}
GPU = {
    "weights": whole.GPU._replace(batches=(1, 64), num_windows=6),
    "kv": whole.GPU._replace(batches=(1, 64), context=4096, num_windows=6),
}
TOY = {kind: whole.TOY._replace(batches=(2,)) for kind in FORMATS}


def format_figures(
    options: Options, spec: ModelSpec, rates: whole.Rates, sizes: whole.Sizes, settings: Settings
) -> dict[str, Any]:
    """Decode in one format, by an engine that is gone when this returns."""
    with engine(
        options.shape,
        max_num_seqs=max(sizes.batches),
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        num_blocks=64 if options.toy else None,
        **settings,
    ) as core:
        quantization = settings.get("quantization", NONE)
        rows = {
            f"decode-{batch}": whole.decode_figure(core, spec, rates, batch, sizes, quantization)
            for batch in sizes.batches
        }
        return settings | {"startup_s": core.info.startup_s} | rows


def measure(options: Options, kind: str, sizes: whole.Sizes) -> int:
    """All formats of one kind on one shape: the number of figures that failed."""
    device = Device(toy=options.toy)
    spec = shapes.spec(options.shape)
    with Record(f"formats-{kind}-{options.shape}", options) as record:
        measured = ceilings(device)
        record.add("ceilings", measured)
        for name, settings in FORMATS[kind].items():
            release(device)
            with record.attempt(name) as add:
                add(format_figures(options, spec, whole.rates_of(measured), sizes, settings))
        return record.num_failed


def main() -> int:
    made = parser(__doc__)
    made.add_argument("kind", choices=list(FORMATS))
    options = parse(made)
    sizes = TOY if options.toy else GPU
    return 1 if measure(options, options.kind, sizes[options.kind]) else 0


if __name__ == "__main__":
    sys.exit(main())

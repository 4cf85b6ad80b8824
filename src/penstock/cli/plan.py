"""`penstock plan`: what a model takes and how fast it will be, from its config alone.

Owns the report, whose arithmetic is that of `engine.memory` and `models.estimate`: what it says
fits is what `penstock serve` plans. No weight is read or downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from penstock import hardware
from penstock.engine.backends import check_stored
from penstock.engine.config import DTYPES, KV_CACHE_DTYPES, EngineConfig
from penstock.errors import ConfigError, NotEnoughMemory, PenstockError
from penstock.quantization.schemes import NAMES, NONE

if TYPE_CHECKING:
    from penstock.engine.memory import MemoryPlan
    from penstock.models.estimate import Estimate, Rates
    from penstock.models.load import Backends
    from penstock.models.spec import ModelSpec
    from penstock.quantization.stored import StoredPrecision

USUAL_CONTEXT = 2048
CONTEXTS = (2048, 8192, 32768)  # and the model's longest
KV_DTYPES = ("float32", "bfloat16", "int8")
AS_STORED = "as stored"
_COUNT = click.IntRange(min=1)


@click.command(epilog="Example: penstock plan Qwen/Qwen3-0.6B --context 8192 --concurrency 8")
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit of a model of a hub; default: main.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens of each request, for the speeds; also the length of the prompt. "
    "Default: 2048, or the model's most.",
)
@click.option(
    "--concurrency",
    type=_COUNT,
    default=8,
    show_default=True,
    help="Requests that decode together, for the speeds beside one request's.",
)
@click.option("--quantization", type=click.Choice(NAMES), help="Only this; default: several.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="As serve has it.")
@click.option(
    "--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), default="auto", help="As serve has it."
)
@click.option("--max-num-batched-tokens", type=_COUNT, default=2048, show_default=True)
@click.option("--max-num-seqs", type=_COUNT, default=64, show_default=True)
@click.option("--num-threads", type=click.IntRange(1, 1024), help="Default: all cores.")
@click.option(
    "--measure/--no-measure", default=True, help="Measure this machine's rates, in some seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, revision: str | None, as_json: bool, context: int | None, **settings: Any
) -> None:
    """Tell what a model takes and how fast it will be here, from its config alone.

    MODEL is a name or a path as serve takes it; a directory needs no weights, and of a model of the
    hub only its config is downloaded.
    """
    found = report(model, revision, Settings(context=context or 0, **settings))
    if as_json:
        click.echo(json.dumps(found))
    else:
        from penstock.cli.plan_text import lines

        click.echo("\n".join(lines(found)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to plan for."""

    context: int = 0  # of a request; 0: `USUAL_CONTEXT`, or the model's most
    concurrency: int = 8
    quantization: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64
    num_threads: int | None = None
    measure: bool = True


class Precision(NamedTuple):
    """One way to hold the weights."""

    name: str
    dtype: str
    quantization: str
    is_timed: bool = True  # whether its speed is told


@dataclass
class _Model:
    """A model, and what is asked of it."""

    name: str
    spec: ModelSpec
    stored: StoredPrecision | None
    settings: Settings

    @cached_property
    def backends(self) -> Backends:
        """What this machine can compute it with."""
        from penstock.models.load import Backends

        return Backends(self.spec)

    @cached_property
    def native_problem(self) -> str | None:
        """Why the native backend cannot compute it here."""
        return self.backends.problem("native")

    def config(self, precision: Precision, **sizes: Any) -> EngineConfig:
        """As `serve` would resolve it, on the CPU.

        Raises:
            ConfigError: the backend has not what is asked for.
        """
        if self.stored is not None:
            check_stored(precision.quantization, self.stored.name)
        settings = self.settings
        asked = EngineConfig(
            model=self.name,
            backend="torch" if self.native_problem else "native",
            dtype=precision.dtype,
            quantization=precision.quantization,
            kv_cache_dtype=settings.kv_cache_dtype,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            num_threads=settings.num_threads,
        )
        return self.resolve(replace(asked, **sizes))

    def resolve(self, config: EngineConfig) -> EngineConfig:
        """The same for any config."""
        return config.resolve(
            max_context_len=self.spec.max_context_len,
            checkpoint_dtype=self.spec.dtype,
            backends=self.backends,
        )

    def plan(self, precision: Precision, available_bytes: int, **sizes: Any) -> MemoryPlan | None:
        """The memory plan of `serve`; None: it does not fit."""
        from penstock.engine.memory import plan_memory

        try:
            config = self.config(precision, **sizes)
            return plan_memory(self.spec, config, available_bytes, self.stored)
        except NotEnoughMemory:
            return None


def report(name: str, revision: str | None, settings: Settings) -> dict[str, Any]:
    """Everything that is told, as `--json` prints it. Sizes are bytes, times seconds.

    Raises:
        ConfigError: there is no such model, or a setting does not suit it.
        ModelLoadError: its config cannot be read.
        UnsupportedModel: its architecture, or a value in its config, is not implemented.
    """
    from penstock.hub import resolve_config
    from penstock.models.checkpoint import precision
    from penstock.models.estimate import pieces
    from penstock.models.files import read_config
    from penstock.models.spec import ModelSpec
    from penstock.quantization.placing import Formats
    from penstock.quantization.schemes import scheme

    path: Path = resolve_config(name, revision)
    config = read_config(path)
    spec = ModelSpec.from_hf(config)
    if not settings.context:
        settings = replace(settings, context=min(USUAL_CONTEXT, spec.max_context_len))
    model = _Model(name, spec, precision(path, config), settings)
    if settings.context > spec.max_context_len:
        raise ConfigError(
            f"`context` is `{settings.context}`, more than the model's `{spec.max_context_len}`.",
            hint=f"use `--context {spec.max_context_len}` or less",
        )
    available_bytes = hardware.available_memory_bytes()
    plain = Formats(scheme(NONE, "float32"))
    num_active = sum(piece.num_parameters * piece.share for piece in pieces(spec, plain))
    num_vectors, size = spec.cached
    return {
        "model": name,
        "architecture": spec.architecture,
        "num_parameters": spec.num_parameters,
        "num_active_parameters": round(num_active),
        "is_guess": spec.is_foreign,  # an architecture of transformers alone: sizes of its MLPs
        "num_layers": spec.num_layers,
        "max_context_len": spec.max_context_len,
        "stored": None if model.stored is None else model.stored.name,
        "kv": {
            "num_vectors": num_vectors,
            "vector_size": size,
            "bytes_per_token": {dtype: spec.kv_bytes_per_token(dtype) for dtype in KV_DTYPES},
        },
        "machine": {
            "cpu": hardware.cpu_name(),
            "num_threads": settings.num_threads or hardware.num_usable_cores(),
            "available_bytes": available_bytes,
            "native_problem": model.native_problem,
        },
        "context": settings.context,
        "concurrency": settings.concurrency,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "precisions": [_precision(model, one, available_bytes) for one in precisions(model)],
        "gpu": _gpu(model) if hardware.has_nvidia_device() else None,
    }


def precisions(model: _Model) -> list[Precision]:
    """Those that are told of: what is asked for, else what this checkpoint can be served in."""
    settings = model.settings
    if model.stored is not None:
        return [Precision(AS_STORED, settings.dtype, settings.quantization or NONE)]
    if settings.quantization not in {None, NONE}:
        quantization = settings.quantization or NONE
        return [Precision(quantization, settings.dtype, quantization)]
    dtype = _plain_dtype(model)
    if settings.dtype != "auto" or settings.quantization is not None:
        return [Precision(dtype, settings.dtype, NONE)]
    plain = [Precision(name, name, NONE, name == dtype) for name in ("float32", "bfloat16")]
    return [*plain, *(Precision(name, "auto", name) for name in ("int8", "int4"))]


def _plain_dtype(model: _Model) -> str:
    """What `serve` computes in, if it is told no more than here."""
    return model.config(Precision("", model.settings.dtype, NONE)).dtype


def _precision(model: _Model, precision: Precision, available_bytes: int) -> dict[str, Any]:
    """What it takes, whether and how often it fits, how fast it is."""
    from penstock.engine.memory import plan_memory

    told: dict[str, Any] = {
        "name": precision.name,
        "dtype": precision.dtype,
        "quantization": precision.quantization,
        "problem": None,
        "weight_bytes": None,
        "kv_cache_dtype": None,
        "largest_context": None,
        "requests": [],
        "plan": [],
        "speed": None,
    }
    try:
        config = model.config(precision, max_model_len=2, max_num_seqs=1)
    except ConfigError as error:
        if precision.name == AS_STORED or model.settings.quantization is not None:
            raise
        return told | {"problem": error.message}
    least = plan_memory(model.spec, config, 2**62, model.stored)
    told |= {
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "weight_bytes": least.weight_bytes,
        "plan": list(least.lines[:1]),
    }
    longest = largest_context(model, precision, available_bytes)
    if longest is None:
        return told | {"problem": "it does not fit into the memory that is available"}
    told |= {
        "largest_context": longest,
        "requests": [
            {
                "context": context,
                "count": num_requests(model, precision, available_bytes, context),
            }
            for context in contexts(model.spec)
        ],
    }
    if precision.is_timed and model.settings.measure and model.native_problem is None:
        told["speed"] = _speed(model, config)
    return told


def contexts(spec: ModelSpec) -> list[int]:
    """For which it is told how many requests fit."""
    longest = spec.max_context_len
    return [*(context for context in CONTEXTS if context < longest), longest]


def largest_context(model: _Model, precision: Precision, available_bytes: int) -> int | None:
    """Tokens of the longest single request that `serve --max-num-seqs 1` has room for."""
    low, high = 2, model.spec.max_context_len
    if model.plan(precision, available_bytes, max_model_len=low, max_num_seqs=1) is None:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if model.plan(precision, available_bytes, max_model_len=middle, max_num_seqs=1):
            low = middle
        else:
            high = middle - 1
    return low


def num_requests(model: _Model, precision: Precision, available_bytes: int, context: int) -> int:
    """Requests of so many tokens that `serve --max-model-len` has room for at the same time."""
    plan = model.plan(precision, available_bytes, max_model_len=context)
    if plan is None:
        one = model.plan(precision, available_bytes, max_model_len=context, max_num_seqs=1)
        return 0 if one is None else 1
    size = EngineConfig(model=model.name).block_size
    return plan.num_blocks // -(-context // size)


def _speed(model: _Model, config: EngineConfig) -> dict[str, Any]:
    """Of this precision; its rates are measured now."""
    from penstock.models import estimate, speeds
    from penstock.quantization.placing import Formats
    from penstock.quantization.schemes import scheme

    settings, spec = model.settings, model.spec
    formats = Formats(scheme(config.quantization, config.dtype), model.stored)
    rates = speeds.measured(
        spec,
        formats,
        dtype=config.dtype,
        kv_dtype=config.kv_cache_dtype,
        num_threads=settings.num_threads,
        num_requests=settings.concurrency,
    )
    counts = sorted({1, settings.concurrency}) if estimate.has_head(spec) else []
    kv_dtype, context = config.kv_cache_dtype, settings.context
    decoded = [
        estimate.decode(spec, formats, kv_dtype, rates, num_requests=count, context_len=context)
        for count in counts
    ]
    chunk = settings.max_num_batched_tokens
    prompt = estimate.prefill(spec, formats, rates, num_tokens=context, chunk=chunk)
    return {"decode": [_told(one) for one in decoded], "prefill": _told(prompt)} | {
        "rates": _rates(rates)
    }


def _told(found: Estimate) -> dict[str, Any]:
    return {
        "num_tokens": found.num_tokens,
        "seconds": found.seconds,
        "tokens_per_s": found.tokens_per_s,
        "terms": [{**term._asdict(), "rate": term.rate} for term in found.terms],
    }


def _rates(rates: Rates) -> dict[str, Any]:
    """What was measured: seconds of one unit of work by the rows that were computed at once."""
    products = [
        {"format": form.dtype, "group_size": form.group_size, "code": form.code and form.code.code}
        | {"rows": list(curve.rows), "seconds_per_parameter": list(curve.seconds)}
        for form, curve in rates.products.items()
    ]
    return {
        "products": products,
        "attention": [
            {"context": context, "requests": list(curve.rows)}
            | {"seconds_per_layer": list(curve.seconds)}
            for context, curve in rates.attention
        ],
        "seconds_per_pair": rates.pair_s,
        "row_ops": {
            "rows": list(rates.row_ops.rows),
            "seconds_per_op": list(rates.row_ops.seconds),
        },
        "sampling": {
            "requests": list(rates.sampling.rows),
            "seconds_per_step": list(rates.sampling.seconds),
        },
    }


def _gpu(model: _Model) -> dict[str, Any]:
    """What `serve` would plan there; no speed is told of it."""
    from penstock.engine.memory import available_bytes, plan_memory

    try:
        asked = EngineConfig(model=model.name, backend="triton", dtype=model.settings.dtype)
        config = model.resolve(asked)
        plan = plan_memory(model.spec, config, available_bytes(config), model.stored)
    except PenstockError as error:
        return {"problem": error.message, "plan": []}
    return {"problem": None, "plan": list(plan.lines)}

"""A plan as people read it: tables, and behind every number its arithmetic in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SHORT = {"multiplications": "mul", "operations": "ops", "pairs": "pairs", "steps": "steps"}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Of a report as `cli.plan.report` returns it."""
    yield from _model(found)
    yield ""
    yield from _weights(found)
    yield ""
    yield from _fits(found)
    if gpu := found["gpu"]:
        yield ""
        yield "on the GPU" + (f": {gpu['problem']}" if gpu["problem"] else "")
        yield from (f"  {line}" for line in gpu["plan"])
    speeds = [one for one in found["precisions"] if one["speed"]]
    if speeds:
        yield ""
        num_threads = found["machine"]["num_threads"]
        yield f"speed, from measured bandwidth and matmul rate, {num_threads} threads"
    for one in speeds:
        yield from _speed(one, found)


def _model(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['model']}: {found['architecture']}"
    active, whole = found["num_active_parameters"], found["num_parameters"]
    yield f"  parameters  {whole:,}; a token is multiplied with {active:,}"
    if found["is_guess"]:
        yield "              a guess: of this architecture the sizes of MLPs are not known for sure"
    if found["stored"]:
        yield f"  stored      {found['stored']}"
    machine, kv = found["machine"], found["kv"]
    yield f"  machine     {machine['cpu']}, {gib(machine['available_bytes'])} available"
    if machine["native_problem"]:
        yield f"              no speeds: {machine['native_problem']}"
    vectors = f"{found['num_layers']} layers x {kv['num_vectors']} vectors of {kv['vector_size']}"
    sizes = [f"{count:,} bytes in {name}" for name, count in kv["bytes_per_token"].items()]
    yield f"  KV a token  {', '.join(sizes)}"
    yield f"              = {vectors} x 4, 2, or 1 byte (int8: and 4 for the scale of each vector)"


def _weights(found: Mapping[str, Any]) -> Iterator[str]:
    yield "weights"
    for one in found["precisions"]:
        if one["weight_bytes"] is None:
            yield f"  {one['name']:<10} {one['problem']}"
            continue
        bits = 8 * one["weight_bytes"] / found["num_parameters"]
        how = one["plan"][0].partition(" = ")[2]
        yield f"  {one['name']:<10} {gib(one['weight_bytes']):>10} = {how}: {bits:.3g} bits each"


def _fits(found: Mapping[str, Any]) -> Iterator[str]:
    """How long one request may be, and how many of some lengths fit."""
    told = [one for one in found["precisions"] if one["weight_bytes"] is not None]
    heads: list[Any] = next((one["requests"] for one in told if one["requests"]), [])
    columns = "".join(f"{entry['context']:>10,}" for entry in heads)
    yield (
        f"what fits, of {found['max_num_seqs']} requests at most   longest request, and how many "
        "requests of so many tokens"
    )
    yield f"  {'precision':<10} {'KV cache':<9} {'longest':>9}{columns}"
    for one in told:
        start = f"  {one['name']:<10} {one['kv_cache_dtype']:<9}"
        if one["largest_context"] is None:
            yield f"{start} {'none':>9}  {one['problem']}"
            continue
        counts = "".join(f"{entry['count']:>10,}" for entry in one["requests"])
        yield f"{start} {one['largest_context']:>9,}{counts}"


def _speed(one: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    context, speed = found["context"], one["speed"]
    for step in speed["decode"]:
        count = step["num_tokens"]
        who = "1 request" if count == 1 else f"{count} requests"
        yield f"  {one['name']}, decode, {who} at {context:,} tokens: {_result(step)}"
        yield from _terms(step)
    yield f"  {one['name']}, prompt of {context:,} tokens: {_result(speed['prefill'])}"
    yield from _terms(speed["prefill"])


def _result(step: Mapping[str, Any]) -> str:
    return f"{time_of(step['seconds'])} -> {step['tokens_per_s']:.3g} tokens/s"


def _terms(step: Mapping[str, Any]) -> Iterator[str]:
    terms = [_term(term) for term in step["terms"] if term["seconds"] > 0]
    yield f"    = {' + '.join(terms)}"


def _term(term: Mapping[str, Any]) -> str:
    name, amount, unit = term["name"], term["amount"], term["unit"]
    if unit == "steps":
        return f"{name} {time_of(term['seconds'])}"
    if unit == "operations":
        return f"{amount:,.0f} {name} x {time_of(1 / term['rate'])}"
    if unit == "bytes":
        return f"{decimal(amount)}B {name} / {decimal(term['rate'])}B/s"
    short = _SHORT[unit]
    return f"{decimal(amount)} {short} {name} / {decimal(term['rate'])} {short}/s"


def gib(num_bytes: float) -> str:
    """In powers of two, as memory is sold."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"


def decimal(number: float) -> str:
    """Three digits and a prefix: 24.9 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def time_of(seconds: float) -> str:
    """Three digits of seconds, or of milli- or microseconds."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"

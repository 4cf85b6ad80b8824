"""GuideLLM's `benchmarks.json`: benchmarks, each with its requests by how they ended.

Read after the schemas of 2026 (`info.timings`, Unix seconds) with the flat fields of reports before
0.4 (`start_time`, `first_token_time`, ...) as a second choice. Requests may be a sample of all.
"""

from __future__ import annotations

from typing import Any, Final

from penstock.measure.records import Arm, Request
from penstock.measure.results.readers.common import (
    Imported,
    count,
    listing,
    mapping,
    number,
    seconds_ns,
    text,
)

NAME: Final = "guidellm"
NAMES: Final = {
    "time_to_first_token_ms": "ttft_s: first token of any kind",
    "time_to_first_output_token_ms": "ttft_visible_s",
    "inter_token_latency_ms": "tpot_s where every chunk is a token: (last - first) / (n - 1)",
    "time_per_output_token_ms": "no counterpart: (last - start) / n, with the first token in it",
    "request_latency": "e2e_s",
    "request_scheduled_latency": "e2e_from_due_s",
    "request_dispatch_delay": "queue_s",
}
# Their `targeted_start` is the moment from which a request might have begun.
_WITHOUT_SCHEDULE: Final = ("synchronous", "concurrent", "throughput")
_STATISTICS: Final = ("count", "mean", "median", "std_dev", "min", "max", "percentiles")


def recognises(document: Any, file_name: str) -> bool:
    """Whether this is the tool's file."""
    runs = listing(mapping(document).get("benchmarks"))
    return bool(runs) and all("metrics" in mapping(run) for run in runs)


def read(document: Any, file_name: str) -> Imported:
    """The tool's file as records; a benchmark is a stage."""
    benchmarks = [mapping(run) for run in listing(document["benchmarks"])]
    arguments = mapping(document.get("args"))
    model = _model(arguments, benchmarks)
    made = Imported(
        arm=Arm(name=model or NAME, target=text(arguments.get("target")) or file_name, model=model),
        settings={name: value for name, value in arguments.items() if _is_plain(value)},
        notes=["Output tokens: the server's usage, else iterations; the file does not say which."],
    )
    zero_s = min(
        (moment for run in benchmarks for _, row in _rows(run) if (moment := _start(row))),
        default=0.0,
    )
    names: dict[str, int] = {}
    for run in benchmarks:
        stage = _stage(run)
        names[stage] = names.get(stage, 0) + 1
        if names[stage] > 1:
            stage += f" ({names[stage]})"
        for index, (status, row) in enumerate(_rows(run)):
            made.requests.append(_request(row, status, index, stage, zero_s))
        made.source[stage] = _sums(mapping(run.get("metrics")))
        total = _count(mapping(made.source[stage].get("request_totals")), "total")
        kept = len(_rows(run))
        if total is not None and total != kept:
            made.notes.append(f"{stage}: the file holds {kept} of {total} requests.")
    return made


def _model(arguments: dict[str, Any], benchmarks: list[dict[str, Any]]) -> str:
    places = [arguments, mapping(arguments.get("backend_kwargs"))]
    for run in benchmarks:
        config = mapping(run.get("config"))
        places += [mapping(config.get("backend")), mapping(run.get("args"))]
    return next((model for place in places if (model := text(place.get("model")))), "")


def _stage(run: dict[str, Any]) -> str:
    config = mapping(run.get("config")) or mapping(run.get("args"))
    strategy = mapping(config.get("strategy"))
    kind = text(strategy.get("type_")) or "benchmark"
    for name, told in (("rate", "rate"), ("streams", "concurrency"), ("max_concurrency", "max")):
        if isinstance(strategy.get(name), int | float):
            return f"{kind} {told}={strategy[name]:g}"
    return kind


def _rows(run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    requests = mapping(run.get("requests"))
    return [
        (status, mapping(row))
        for status in ("successful", "incomplete", "errored")
        for row in listing(requests.get(status))
    ]


def _times(row: dict[str, Any]) -> dict[str, Any]:
    return mapping(mapping(row.get("info")).get("timings"))


def _start(row: dict[str, Any]) -> float | None:
    times = _times(row)
    return _first(times.get("request_start"), times.get("resolve_start"), row.get("start_time"))


def _first(*moments: Any) -> float | None:
    """The first of the moments that is there."""
    return next((found for one in moments if (found := number(one, "timings")) is not None), None)


def _count(values: dict[str, Any], name: str) -> int | None:
    return count(values.get(name), name)


def _request(row: dict[str, Any], status: str, index: int, stage: str, zero_s: float) -> Request:
    has_schedule = stage.split()[0] not in _WITHOUT_SCHEDULE
    times = _times(row)

    def moment(*values: Any) -> int | None:
        found = _first(*values)
        return None if found is None else seconds_ns(found - zero_s)

    inputs, outputs = mapping(row.get("input_metrics")), mapping(row.get("output_metrics"))
    told = _count(outputs, "total_tokens") or _count(outputs, "text_tokens")
    made = Request(
        index=index,
        stage=stage,
        prompt_id=text(row.get("request_id")) or str(index),
        t_due_ns=moment(times.get("targeted_start")) if has_schedule else None,
        t_sent_ns=moment(_start(row)),
        t_first_ns=moment(times.get("first_token_iteration"), row.get("first_token_time")),
        t_first_visible_ns=moment(times.get("first_output_token_iteration")),
        t_last_ns=moment(times.get("last_token_iteration"), row.get("last_token_time")),
        t_done_ns=moment(times.get("request_end"), times.get("resolve_end"), row.get("end_time")),
        n_in=_count(row, "prompt_tokens") or _count(inputs, "text_tokens"),
        n_cached=_count(inputs, "cached_tokens"),
        n_out=told if told is not None else _count(row, "output_tokens"),
        count_source="usage",
        n_chunks=_count(times, "token_iterations") or 0,
        output=text(row.get("output")) or None,
    )
    if told is None and made.n_out is not None and made.n_out == made.n_chunks:
        made.count_source = "chunks"  # as the tool falls back to
    if status == "incomplete":
        made.error_class = "cut"
    elif status == "errored":
        made.error_class = "server"
        made.error = text(mapping(row.get("info")).get("error")) or text(row.get("error")) or None
    return made


def _sums(metrics: dict[str, Any]) -> dict[str, Any]:
    """The tool's figures of answered requests, without its densities."""
    made: dict[str, Any] = {}
    for name, value in metrics.items():
        good = mapping(mapping(value).get("successful"))
        if name == "request_totals":
            made[name] = value
        elif good:
            made[name] = {key: good[key] for key in _STATISTICS if key in good}
    return made


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)

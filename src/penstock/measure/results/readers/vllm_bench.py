"""`vllm bench serve --save-result`: a JSON object, or one a line where results were appended.

Rows are there with `--save-detailed` only. Read after `vllm/benchmarks/serve.py` of 2026: times are
seconds, `start_times` (not in older files) is a clock of the client.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

from penstock.measure.records import Arm, Request
from penstock.measure.results.readers.common import (
    Imported,
    count,
    duration,
    listing,
    number,
    same_length,
    seconds_ns,
    text,
)

NAME: Final = "vllm-bench"
NAMES: Final = {
    "ttft": "ttft_s (ms there)",
    "tpot": "tpot_s where every chunk is a token: (e2el - ttft) / (n - 1)",
    "itl": "chunk_gap_s: time between chunks, which may hold several tokens",
    "e2el": "e2e_s (ms there), to the last chunk",
    "client_queue_time": "queue_s: the wait for --max-concurrency alone",
    "request_goodput": "no counterpart: there, a request with one token passes any TPOT",
    "output_throughput": "output tokens/s over the whole duration, ramp and drain included",
}
_ROWS: Final = frozenset(
    {
        *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times"),
        *("queue_times", "generated_texts", "errors"),
    }
)
_SETTINGS: Final = (
    *("backend", "endpoint_type", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "date"),
)


def recognises(document: Any, file_name: str) -> bool:
    """Whether this is the tool's file."""
    first = document[0] if isinstance(document, list) and document else document
    return (
        isinstance(first, dict)
        and "model_id" in first
        and "request_throughput" in first
        and "completed" in first
    )


def read(document: Any, file_name: str) -> Imported:
    """The tool's file as records; several results in it are several stages."""
    results = document if isinstance(document, list) else [document]
    model = text(results[0].get("model_id"))
    made = Imported(
        arm=Arm(
            name=model or "vllm-bench",
            target=file_name,
            model=model,
            engine=text(results[0].get("backend")) or text(results[0].get("endpoint_type")),
        ),
        date=text(results[0].get("date")),
    )
    for result in results:
        stage = _stage(result) if len(results) > 1 else ""
        requests, notes = _requests(result, stage, file_name)
        made.requests += requests
        made.notes += [note for note in notes if note not in made.notes]
        sums = {
            name: value
            for name, value in result.items()
            if name not in _ROWS and name not in _SETTINGS and not isinstance(value, list)
        }
        made.source[stage or "all"] = sums
        made.settings[stage or "all"] = {
            name: result[name] for name in _SETTINGS if result.get(name) is not None
        }
    made.has_timeline = all("start_times" in result for result in results)
    return made


def _stage(result: dict[str, Any]) -> str:
    parts = {"rate": result.get("request_rate"), "concurrency": result.get("max_concurrency")}
    return ",".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def _requests(
    result: dict[str, Any], stage: str, file_name: str
) -> tuple[list[Request], list[str]]:
    columns = {name: listing(result.get(name)) for name in _ROWS}
    num_requests = same_length(file_name, **columns)
    if not columns["ttfts"]:
        return [], ["No rows: the file was written without --save-detailed."]
    notes = ["Output tokens: the server's usage, else a tokenizer; the file does not say which."]
    if not columns["start_times"]:
        notes.append("No start times: every request begins at zero, and there is no timeline.")
    if not columns["latencies"]:
        notes.append("No latencies: an answer ends with its last chunk.")
    rows = []
    starts = [number(value, "start_times") for value in columns["start_times"]]
    zero_s = min((value for value in starts if value is not None), default=0.0)
    for index in range(num_requests):
        cells = {name: values[index] for name, values in columns.items() if values}
        rows.append(_request(cells, index, stage, zero_s))
    return rows, notes


def _request(cells: dict[str, Any], index: int, stage: str, zero_s: float) -> Request:
    start_s = number(cells.get("start_times"), "start_times")
    sent_s = 0.0 if start_s is None else start_s - zero_s
    row = Request(
        index=index,
        stage=stage,
        prompt_id=str(index),
        t_sent_ns=seconds_ns(sent_s),
        n_in=count(cells.get("input_lens"), "input_lens"),
        output=text(cells.get("generated_texts")) or None,
    )
    queued_s = duration(cells.get("queue_times"), "queue_times")
    if queued_s is not None:
        row.t_due_ns = seconds_ns(sent_s - queued_s)
    error = cells.get("errors")
    ttft_s = duration(cells.get("ttfts"), "ttfts")
    if error or not ttft_s:  # a status without a reason leaves no text
        row.error_class, row.error = "server", str(error or "The file gives no reason.")
        return row
    first_s = sent_s + ttft_s
    gaps = [duration(gap, "itls") for gap in listing(cells.get("itls"))]
    there = [gap for gap in gaps if gap is not None]
    if len(there) < len(gaps):
        raise ValueError("`itls` has a gap that is null")
    chunks_s = list(accumulate(there, initial=first_s))
    latency_s = duration(cells.get("latencies"), "latencies")
    row.t_first_ns = seconds_ns(first_s)  # of any chunk: a role or reasoning, too
    row.chunk_t_ns = [seconds_ns(moment) for moment in chunks_s]
    row.t_last_ns = row.chunk_t_ns[-1]
    row.t_done_ns = row.t_last_ns if latency_s is None else seconds_ns(sent_s + latency_s)
    row.n_out, row.count_source = count(cells.get("output_lens"), "output_lens"), "usage"
    row.n_chunks = len(chunks_s)
    return row

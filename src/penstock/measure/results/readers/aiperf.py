"""AIPerf: `profile_export.jsonl` (a record a request) and `profile_export_aiperf.json` (figures).

Read after AIPerf's documented export models (schema 1.0): moments are Unix nanoseconds, metrics
have a value and a unit. Without `--export-level records` there are no rows; raw records have no
metrics and are not read.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

from penstock.measure.records import Arm, Phase, Request
from penstock.measure.results.readers.common import (
    Imported,
    count,
    duration,
    listing,
    mapping,
    number,
    seconds_ns,
    text,
)

NAME: Final = "aiperf"
NAMES: Final = {
    "time_to_first_token": "ttft_s (ms there)",
    "time_to_first_output_token": "ttft_visible_s (ms there)",
    "inter_token_latency": "tpot_s where every chunk is a token: (latency - ttft) / (n - 1)",
    "inter_chunk_latency": "chunk_gap_s",
    "request_latency": "e2e_s (ms there)",
    "effective_latency": "e2e_from_due_s",
    "output_sequence_length": "n_out, reasoning included",
    "output_token_count": "n_out without reasoning",
    "reasoning_token_count": "n_reasoning",
    "input_sequence_length": "n_in",
}
_UNITS_S: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}


def recognises(document: Any, file_name: str) -> bool:
    """Whether this is one of the tool's files."""
    if isinstance(document, list):
        return bool(document) and all(
            "request_start_ns" in mapping(mapping(row).get("metadata")) and "metrics" in row
            for row in document[:3]
        )
    known = mapping(document)
    return "unit" in mapping(known.get("request_latency")) and (
        "aiperf_version" in known or "input_config" in known
    )


def read(document: Any, file_name: str) -> Imported:
    """One of the tool's files as records, or as figures."""
    if not isinstance(document, list):
        return _figures(document, file_name)
    zero_ns = min(_start_ns(row) for row in document)
    requests = [_request(row, index, zero_ns) for index, row in enumerate(document)]
    return Imported(
        arm=Arm(name=NAME, target=file_name),
        requests=requests,
        notes=[
            "Output tokens: as the tool counted them, by the server's usage or its own tokenizer."
        ],
    )


def _figures(document: dict[str, Any], file_name: str) -> Imported:
    config = mapping(document.get("input_config"))
    endpoint = mapping(config.get("endpoint"))
    names = listing(endpoint.get("model_names"))
    model = ", ".join(map(str, names))
    return Imported(
        arm=Arm(name=model or NAME, target=text(endpoint.get("url")) or file_name, model=model),
        source={
            name: value
            for name, value in document.items()
            if name != "input_config" and value is not None
        },
        settings={"input_config": config} if config else {},
        date=text(document.get("start_time")),
    )


def _start_ns(row: dict[str, Any]) -> int:
    return _moment_ns(mapping(row.get("metadata")), "request_start_ns") or 0


def _moment_ns(about: dict[str, Any], name: str) -> int | None:
    """Nanoseconds since 1970, which a float would round."""
    return None if number(about.get(name), name) is None else int(about[name])


def _request(row: dict[str, Any], index: int, zero_ns: int) -> Request:
    about, metrics = mapping(row.get("metadata")), mapping(row.get("metrics"))

    def seconds(name: str) -> float | None:
        metric = mapping(metrics.get(name))
        value, factor = duration(metric.get("value"), name), _UNITS_S.get(text(metric.get("unit")))
        return None if value is None or factor is None else value * factor

    def tokens(name: str) -> int | None:
        return count(mapping(metrics.get(name)).get("value"), name)

    def moment(name: str) -> int | None:
        value_ns = _moment_ns(about, name)
        return None if value_ns is None else value_ns - zero_ns

    sent_ns = _start_ns(row) - zero_ns
    made = Request(
        index=index,
        prompt_id=text(about.get("conversation_id")) or str(index),
        phase=_phase(about),
        t_due_ns=moment("credit_issued_ns"),
        t_sent_ns=sent_ns,
        t_done_ns=moment("request_end_ns"),
        n_in=tokens("input_sequence_length"),
        n_out=tokens("output_sequence_length"),
        n_reasoning=tokens("reasoning_token_count"),
        details={name: about[name] for name in ("x_request_id", "turn_index") if about.get(name)},
    )
    if made.n_out is not None:
        made.count_source = "usage"
    error = mapping(row.get("error"))
    if error or about.get("was_cancelled"):
        made.error_class, made.http_status = _error(error, about)
        made.error = text(error.get("message")) or text(error.get("type")) or None
        return made
    latency_s, ttft_s = seconds("request_latency"), seconds("time_to_first_token")
    if latency_s is not None:
        made.t_done_ns = sent_ns + seconds_ns(latency_s)
    if ttft_s is not None:
        made.t_first_ns = sent_ns + seconds_ns(ttft_s)
        made.t_last_ns = made.t_done_ns
        _chunks(made, mapping(metrics.get("inter_chunk_latency")))
    visible_s = seconds("time_to_first_output_token")
    if visible_s is not None:
        made.t_first_visible_ns = sent_ns + seconds_ns(visible_s)
    return made


def _chunks(made: Request, metric: dict[str, Any]) -> None:
    """Moments of the chunks from the gaps between them."""
    factor = _UNITS_S.get(text(metric.get("unit")))
    gaps = [duration(gap, "inter_chunk_latency") for gap in listing(metric.get("value"))]
    if factor is None or not gaps or None in gaps or made.t_first_ns is None:
        return
    steps = [seconds_ns(gap * factor) for gap in gaps if gap is not None]
    made.chunk_t_ns = list(accumulate(steps, initial=made.t_first_ns))
    made.n_chunks = len(made.chunk_t_ns)


def _phase(about: dict[str, Any]) -> Phase:
    return "warmup" if about.get("benchmark_phase") == "warmup" else "steady"


def _error(error: dict[str, Any], about: dict[str, Any]) -> tuple[str, int | None]:
    code = error.get("code")
    status = code if isinstance(code, int) and not isinstance(code, bool) else None
    if about.get("was_cancelled"):
        return "cut", None
    if "timeout" in text(error.get("type")).lower():
        return "timeout", None
    if status is not None and 400 <= status < 600:
        return f"http_{status}", status
    return "server", None

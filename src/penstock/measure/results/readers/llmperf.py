"""LLMPerf's `*_individual_responses.json`: a list of requests with their durations.

Its inter-token latency is a mean over chunks with the first token's wait in it, so it is kept under
its own name; tokens are counted by one Llama tokenizer for every model.
"""

from __future__ import annotations

from typing import Any, Final

from penstock.measure.records import Arm, Request
from penstock.measure.results.readers.common import Imported, count, duration, mapping, seconds_ns

NAME: Final = "llmperf"
NAMES: Final = {
    "ttft_s": "ttft_s",
    "end_to_end_latency_s": "e2e_s",
    "inter_token_latency_s": "no counterpart: gaps between chunks and the ttft, over chunks",
    "request_output_throughput_token_per_s": "n_out / e2e_s, with the first token's wait in it",
    "number_output_tokens": "n_out, by one Llama tokenizer for every model",
}
_KEPT: Final = ("inter_token_latency_s", "request_output_throughput_token_per_s")


def recognises(document: Any, file_name: str) -> bool:
    """Whether this is the tool's file."""
    return (
        isinstance(document, list)
        and bool(document)
        and all("end_to_end_latency_s" in mapping(row) for row in document[:3])
    )


def read(document: Any, file_name: str) -> Imported:
    """The tool's file as records."""
    return Imported(
        arm=Arm(name=file_name.rpartition(".")[0] or NAME, target=file_name),
        requests=[_request(mapping(row), index) for index, row in enumerate(document)],
        notes=["No start times: every request begins at zero, and there is no timeline."],
        has_timeline=False,
    )


def _request(row: dict[str, Any], index: int) -> Request:
    latency_s = duration(row.get("end_to_end_latency_s"), "end_to_end_latency_s")
    ttft_s = duration(row.get("ttft_s"), "ttft_s")
    made = Request(
        index=index,
        prompt_id=str(index),
        t_sent_ns=0,
        t_done_ns=None if latency_s is None else seconds_ns(latency_s),
        n_in=count(row.get("number_input_tokens"), "number_input_tokens"),
        n_out=count(row.get("number_output_tokens"), "number_output_tokens"),
        count_source="tokenizer",
        details={name: row[name] for name in _KEPT if row.get(name) is not None},
    )
    if row.get("error_code") is not None:
        made.error_class = "server"
        made.error = f"{row['error_code']}: {row.get('error_msg') or ''}".rstrip(": ")
    elif ttft_s is not None:
        made.t_first_ns = seconds_ns(ttft_s)
    return made

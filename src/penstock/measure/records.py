"""What a measurement leaves behind, line by line: requests, samples of meters, marks in time.

Knows no figure and no file. Times are nanoseconds on the monotonic clock of the measuring process
since the run began (`Clock`). None means: it did not happen, or nobody said. The names of the
figures that are made of these, and their formulas, are in `penstock.measure.metrics`.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

Phase = Literal["warmup", "ramp", "steady", "drain"]  # only `steady` counts for latencies
CountSource = Literal["usage", "tokenizer", "chunks", "none"]


class Request(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="request"):
    """One request and what became of it. An error is a request too.

    `error_class` is None (answered), `http_<status>`, `connect`, `timeout`, `protocol` (the answer
    is not what the dialect says), `server` (an error within a stream), or `cut` (the run ended
    first: neither good nor bad).
    """

    arm: str = ""
    block: int = 0  # of an interleaved comparison
    stage: str = ""  # the point of a sweep, such as `rate=4`
    phase: Phase = "steady"
    index: int = 0  # in the order of due times within the stage

    prompt_id: str = ""
    prompt_hash: str = ""
    model: str = ""
    engine: str = ""
    precision: str = ""
    provider: str = ""
    region: str = ""

    t_due_ns: int | None = None  # when the schedule, or a free client, wanted it to be sent
    t_sent_ns: int | None = None  # before its first byte was written
    t_first_ns: int | None = None  # first chunk with a token of any kind
    t_first_visible_ns: int | None = None  # first chunk with a token that is no reasoning
    t_last_ns: int | None = None  # last chunk with a token
    t_done_ns: int | None = None  # the answer's end, or the error
    chunk_t_ns: list[int] = []  # of each chunk with a token
    chunk_n: list[int] = []  # tokens in each of them; empty: nobody said

    n_in: int | None = None
    n_cached: int | None = None  # of `n_in`, from the server's prefix cache
    n_out: int | None = None  # reasoning included
    n_reasoning: int | None = None
    count_source: CountSource = "none"  # of n_out
    n_chunks: int = 0

    finish_reason: str | None = None
    http_status: int | None = None
    error_class: str | None = None
    error: str | None = None
    retries: int = 0
    retry_after_s: float | None = None  # what a refusal said

    task: str = ""  # what the answer was graded for
    scores: dict[str, float] = {}  # by kind, such as `exact_match`; higher is better
    output_hash: str | None = None
    output: str | None = None
    details: dict[str, Any] = {}  # what a grader or a probe wants to keep

    usd: float | None = None
    usd_source: str | None = None  # price list, its date, and the entry

    @property
    def ok(self) -> bool:
        """Whether there is a whole answer."""
        return self.error_class is None and self.t_done_ns is not None


class Sample(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="sample"):
    """What meters read at one moment, such as `{"rss_bytes": 1e9, "package_j": 12.5}`."""

    t_ns: int
    arm: str = ""
    source: str  # of the values, such as `rapl`, `nvml`, `proc`, `model`
    values: dict[str, float]


class Mark(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="mark"):
    """Something that happened at one moment, such as the begin of a phase."""

    t_ns: int
    arm: str = ""
    stage: str = ""
    name: str
    facts: dict[str, Any] = {}


Record = Request | Sample | Mark


class Arm(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One of the things that are measured."""

    name: str
    target: str  # what the user wrote, without secrets
    model: str = ""
    engine: str = ""
    engine_version: str = ""
    precision: str = ""
    provider: str = ""
    flags: list[str] = []
    hashes: dict[str, str] = {}  # of weights, tokenizer, template, as far as they can be read


class Header(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a run is: written before its first record, and never changed."""

    run_id: str
    kind: str  # a name of `penstock.measure.kinds`
    started_at: str  # UTC, ISO 8601
    version: str  # of penstock
    command: list[str] = []  # without secrets
    settings: dict[str, Any] = {}  # whatever a figure depends on, seeds among them
    arms: list[Arm] = []
    hashes: dict[str, str] = {}  # of prompts, data, prices
    prices: dict[str, Any] = {}  # the entries that were used, with source and date
    environment: dict[str, Any] = {}


class Clock:
    """Nanoseconds since the run began."""

    def __init__(self) -> None:
        self.zero_ns = time.perf_counter_ns()

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self.zero_ns

    def at_ns(self, perf_counter_ns: int) -> int:
        """A reading of `time.perf_counter_ns()`, on this clock."""
        return perf_counter_ns - self.zero_ns

"""Prometheus metrics of one server, in a registry of their own.

Histograms are observed here; gauges and counters of the engine are read from its latest stats when
somebody scrapes. Labels are bounded: routes and outcomes, never a key, a user or a model's text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from penstock.types import EngineStats

if TYPE_CHECKING:
    from penstock.server.calls import Call

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0),
)


class EngineView:
    """What a scrape reads: the engine's stats, and how many requests the server holds open."""

    def __init__(self, stats: Callable[[], EngineStats], num_open: Callable[[], int]) -> None:
        self.stats = stats
        self.num_open = num_open


class _EngineCollector(Collector):
    """The engine's figures at the time of the scrape."""

    def __init__(self, view: EngineView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        stats = self._view.stats()
        gauges = {
            "requests_running": ("requests that hold a row of the engine", stats.num_running),
            "requests_waiting": ("requests that wait for a row", stats.num_waiting),
            "requests_open": ("answers that the server holds open", self._view.num_open()),
            "kv_blocks": ("blocks of the KV cache", stats.num_blocks),
            "kv_blocks_used": ("blocks held by live requests", stats.num_used_blocks),
            "kv_cache_usage_ratio": (
                "part of the KV cache that live requests hold",
                stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0,
            ),
        }
        counters = {
            "engine_steps": ("steps of the engine", stats.num_steps),
            "prompt_tokens": ("prompt tokens computed", stats.num_prompt_tokens),
            "generation_tokens": ("tokens generated", stats.num_generated_tokens),
            "prefix_cache_query_tokens": (
                "prompt tokens looked up in the prefix cache",
                stats.num_prefix_query_tokens,
            ),
            "prefix_cache_hit_tokens": (
                "prompt tokens found in the prefix cache",
                stats.num_prefix_hit_tokens,
            ),
            "preemptions": ("requests put back for lack of KV blocks", stats.num_preemptions),
            "prefill_chunks": ("slices that did not reach their prompt's end", stats.num_chunks),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"penstock_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"penstock_{name}", text, value=value)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        # A series more for each counter, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=False)

        def histogram(name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(
                f"penstock_{name}", text, labels, buckets=_SECONDS, registry=self._registry
            )

        self._ttft = histogram("time_to_first_token_seconds", "from arrival to the first token")
        self._tpot = histogram(
            "time_per_output_token_seconds", "(last - first token) / (tokens - 1)"
        )
        self._queue = histogram("queue_seconds", "from arrival to the first step in the engine")
        self._e2e = histogram("request_seconds", "from arrival to the end", ("route",))
        self._requests = Counter(
            "penstock_requests",
            "HTTP requests by what came of them",
            ("route", "outcome"),
            registry=self._registry,
        )
        self._answers = Counter(
            "penstock_answers",
            "answers by why they ended",
            ("finish",),
            registry=self._registry,
        )

    def watch_engine(self, view: EngineView) -> None:
        """Report an engine's figures from now on."""
        self._registry.register(_EngineCollector(view))

    def observe_call(self, call: Call) -> None:
        """An HTTP request is over."""
        self._requests.labels(call.route, call.outcome).inc()
        if call.num_answers:
            self._e2e.labels(call.route).observe(time.monotonic() - call.started_s)

    def observe_answer(
        self, finish: str, queue_s: float, ttft_s: float, decode_s: float, num_tokens: int
    ) -> None:
        """An answer is complete; `decode_s` is from its first token to its last."""
        self._answers.labels(finish).inc()
        self._queue.observe(queue_s)
        self._ttft.observe(ttft_s)
        if num_tokens > 1:
            self._tpot.observe(decode_s / (num_tokens - 1))

    def observe_pooled(self, queue_s: float) -> None:
        """A text has its vector."""
        self._answers.labels("pooled").inc()
        self._queue.observe(queue_s)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

"""Limits that requests shall keep: reading them, judging one request, judging many.

`ttft_p95=0.5s` is a limit on a quantile, `ttft=0.5s` one for each request. ttft and e2e are counted
from the due time, because that is what a user waits; `ttft_sent` and `e2e_sent` are from sending.
Invariant: a request that failed has waited for ever; one that was cut counts only where the time
that it had waited breaks the limit already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure import metrics
from penstock.measure.records import Request

METRICS = {
    "ttft": metrics.ttft_from_due_s,
    "ttft_sent": metrics.ttft_s,
    "ttft_visible": metrics.ttft_visible_s,
    "tpot": metrics.tpot_s,
    "e2e": metrics.e2e_from_due_s,
    "e2e_sent": metrics.e2e_s,
    "queue": metrics.queue_s,
}
_LONG_S = 1e9  # in place of infinity, where it is not reached but must be reckoned with
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_LIMIT = re.compile(
    r"(?P<metric>[a-z0-9]+(?:_sent|_visible|_rate)?)(?:_(?P<of>mean|p\d+(?:\.\d+)?))?"
    r"(?:<=|<|=|(?P<vllm>:))(?P<value>\d+(?:\.\d+)?|\.\d+)(?P<unit>[a-zµ%]*)"
)
_HINT = (
    f"such as `ttft_p95=0.5s,tpot_p95=50ms`, `e2e=10s` or `error_rate=1%`; known: "
    f"{', '.join(METRICS)}, error_rate"
)


class Limit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The highest value that is good. Without `of` it holds for each request."""

    metric: str  # a name of METRICS, or `error_rate`
    limit: float  # seconds, or a share
    of: str = ""  # `mean`, or a quantile such as `p95`

    def __str__(self) -> str:
        unit = "" if self.metric == "error_rate" else " s"
        return f"{self.metric}{'_' + self.of if self.of else ''} <= {self.limit:g}{unit}"


def parse(text: str) -> list[Limit]:
    """Read `ttft_p95=0.5s,tpot_p95=50ms`; `ttft:500 tpot:50` (vLLM's, milliseconds) is read too.

    Raises:
        ConfigError: a part of it is no limit.
    """
    return [_parse_one(part) for part in re.split(r"[,\s]+", text.strip()) if part]


def _parse_one(text: str) -> Limit:
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"`{text}` is no limit.", hint=_HINT)
    metric, of, unit = match["metric"], match["of"] or "", match["unit"]
    metric = "e2e" if metric == "e2el" else metric
    value = float(match["value"])
    if metric == "error_rate":
        if of or unit not in ("", "%"):
            raise ConfigError(f"`{text}` is no share of requests.", hint=_HINT)
        share = value / 100 if unit else value
        if share > 1:
            raise ConfigError(f"`{text}` is more than all requests.", hint=_HINT)
        return Limit(metric=metric, limit=share)
    if metric not in METRICS:
        raise ConfigError(f"`{text}` limits `{metric}`, which is not known.", hint=_HINT)
    unit = "ms" if match["vllm"] and not unit else unit
    if not unit:
        raise ConfigError(f"`{text}` has no unit: s, ms or us.", hint=_HINT)
    if unit not in _UNITS:
        raise ConfigError(f"`{text}` has the unit `{unit}`, and not s, ms or us.", hint=_HINT)
    if of.startswith("p") and not 0 < float(of[1:]) < 100:
        raise ConfigError(f"`{text}` is no quantile between p0 and p100.", hint=_HINT)
    return Limit(metric=metric, of=of, limit=value * _UNITS[unit])


def per_request(limits: Iterable[Limit]) -> list[Limit]:
    """Those that each request can keep or break."""
    return [limit for limit in limits if not limit.of and limit.metric != "error_rate"]


def over_many(limits: Iterable[Limit]) -> list[Limit]:
    """Those that only many requests together can keep or break."""
    return [limit for limit in limits if limit.of or limit.metric == "error_rate"]


def judged_s(row: Request, limit: Limit) -> float | None:
    """The value that a limit in seconds sees: infinite for a request that failed.

    None: it says nothing, because a single token has no time between tokens, or because the run
    ended while the limit could still be kept. A cut request that had broken it already never can.
    """
    value = METRICS[limit.metric](row)
    if row.error_class is None:
        return value
    if row.error_class != "cut":
        return math.inf
    if value is not None and limit.metric.startswith(("ttft", "queue")):
        return value  # that part of it was over
    if limit.metric == "tpot" or row.t_done_ns is None:
        return None
    start_ns = row.t_due_ns if limit.metric in ("ttft", "e2e", "queue") else row.t_sent_ns
    waited_s = 0.0 if start_ns is None else (row.t_done_ns - start_ns) * metrics.NS
    return math.inf if waited_s > limit.limit else None


def is_good(row: Request, limits: Sequence[Limit]) -> bool | None:
    """Whether a request was answered within every limit of its own; None: it was cut before.

    A cut request that had broken a limit already is not good. Of an answer that was not streamed,
    or whose tokens nobody counted, it cannot be said; one of a single token has no time between.
    """
    values = [(judged_s(row, limit), limit) for limit in per_request(limits)]
    if any(value is not None and value > limit.limit for value, limit in values):
        return False
    if row.error_class == "cut":
        return None
    is_short = row.chunk_n[:1] == [row.n_out] or (row.n_out == 1 and row.count_source != "chunks")
    if any(value is None and not (limit.metric == "tpot" and is_short) for value, limit in values):
        return None
    return row.ok


def judge(rows: Sequence[Request], limits: Iterable[Limit]) -> list[dict[str, Any]]:
    """What each limit over many came to: limit, value (None: unknown), n, kept, undecided.

    Undecided, and not kept: it would be broken if those that were cut had waited for ever.
    """
    verdicts = []
    for limit in over_many(limits):
        value, num = _value(rows, limit)
        kept = value is not None and value <= limit.limit
        worst, _ = _value(rows, limit, cut_s=math.inf)
        undecided = kept and worst is not None and worst > limit.limit
        shown = None if value is None or math.isinf(value) else value
        told = {"limit": str(limit), "value": shown, "n": num, "kept": kept and not undecided}
        verdicts.append(told | {"undecided": undecided})
    return verdicts


def _value(
    rows: Sequence[Request], limit: Limit, *, cut_s: float | None = None
) -> tuple[float | None, int]:
    """The value that a limit sees, and of how many; `cut_s`: of those that were cut too early."""
    if limit.metric == "error_rate":
        ended = [row for row in rows if row.error_class != "cut"]
        failed = sum(not row.ok for row in ended)
        return (failed / len(ended) if ended else None), len(ended)
    judged = ((row, judged_s(row, limit)) for row in rows)
    filled = (
        cut_s if value is None and row.error_class == "cut" and limit.metric != "tpot" else value
        for row, value in judged
    )
    values = sorted(value for value in filled if value is not None)
    if not values:
        return None, 0
    if limit.of == "mean":
        return math.fsum(values) / len(values), len(values)
    share = float(limit.of[1:]) / 100
    if math.isinf(values[math.ceil((len(values) - 1) * share)]):
        return math.inf, len(values)  # between a time and for ever there is no middle
    return metrics.quantile([min(value, _LONG_S) for value in values], share), len(values)

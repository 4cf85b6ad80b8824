"""The figures of a request, and how many requests become one figure. Pure functions of records.

Names are ours, because the field uses one name for different things; `FORMULAS` is printed with
every report. A chunk is not a token: counts come from the server's usage or from a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from penstock.measure.records import Request

FORMULAS = {
    "queue_s": "t_sent - t_due: how late the client was",
    "ttft_s": "t_first - t_sent: first token of any kind",
    "ttft_visible_s": "t_first_visible - t_sent: first token that is no reasoning",
    "ttft_from_due_s": "t_first - t_due",
    "tpot_s": "(t_last - t_first) / (n_out - n_first); n_first: tokens of the first chunk, else 1",
    "e2e_s": "t_done - t_sent",
    "e2e_from_due_s": "t_done - t_due: what a user waits",
    "chunk_gap_s": "time between chunks of an answer; not a time between tokens",
}
# The same in words: a table shows these, with the name where programs look for it.
TITLES = {
    "queue_s": "sent late, by the client",
    "ttft_s": "time to first token",
    "ttft_visible_s": "time to first visible token",
    "ttft_from_due_s": "time to first token, from due",
    "tpot_s": "time per output token",
    "e2e_s": "end to end",
    "e2e_from_due_s": "end to end, from due",
    "chunk_gap_s": "gap between chunks",
}
NS = 1e-9


def _between(start_ns: int | None, end_ns: int | None) -> float | None:
    return None if start_ns is None or end_ns is None else (end_ns - start_ns) * NS


def queue_s(row: Request) -> float | None:
    return _between(row.t_due_ns, row.t_sent_ns)


def ttft_s(row: Request) -> float | None:
    return _between(row.t_sent_ns, row.t_first_ns)


def ttft_visible_s(row: Request) -> float | None:
    return _between(row.t_sent_ns, row.t_first_visible_ns)


def ttft_from_due_s(row: Request) -> float | None:
    return _between(row.t_due_ns, row.t_first_ns)


def tpot_s(row: Request) -> float | None:
    """Time of an output token after the first chunk; None where no token came after it, or all
    came at once and nobody said how many were in a chunk.

    Reasoning that is counted and never sent came before the first chunk.
    """
    if row.n_out is None or row.count_source == "chunks":
        return None
    num_hidden = (row.n_reasoning or 0) if row.t_first_ns == row.t_first_visible_ns else 0
    num_later = row.n_out - (row.chunk_n[0] if row.chunk_n else 1 + num_hidden)
    between = _between(row.t_first_ns, row.t_last_ns)
    return between / num_later if between and num_later >= 1 else None


def e2e_s(row: Request) -> float | None:
    return _between(row.t_sent_ns, row.t_done_ns)


def e2e_from_due_s(row: Request) -> float | None:
    return _between(row.t_due_ns, row.t_done_ns)


def chunk_gaps_s(row: Request) -> list[float]:
    return [(b - a) * NS for a, b in zip(row.chunk_t_ns, row.chunk_t_ns[1:], strict=False)]


OF_REQUEST: dict[str, Callable[[Request], float | None]] = {
    "queue_s": queue_s,
    "ttft_s": ttft_s,
    "ttft_visible_s": ttft_visible_s,
    "ttft_from_due_s": ttft_from_due_s,
    "tpot_s": tpot_s,
    "e2e_s": e2e_s,
    "e2e_from_due_s": e2e_from_due_s,
}


def quantile(values: Sequence[float], q: float) -> float:
    """The `q` quantile (0 to 1) of sorted or unsorted values, linear between order statistics.

    Hyndman and Fan's type 7, which numpy and most tools compute.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * q
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """n, mean, p50, p90, p95, p99, max of the values that are there.

    A quantile with fewer than 10 values beyond it says little (`is_supported`): reports mark it.
    """
    there = sorted(value for value in values if value is not None)
    if not there:
        return {
            "n": 0,
            "mean": None,
            "p50": None,
            "p90": None,
            "p95": None,
            "p99": None,
            "max": None,
        }
    marks = {f"p{100 * q:g}": quantile(there, q) for q in (0.5, 0.9, 0.95, 0.99)}
    return {"n": len(there), "mean": math.fsum(there) / len(there), **marks, "max": there[-1]}


def is_supported(num_values: int, q: float) -> bool:
    """Whether at least 10 of the values lie beyond the `q` quantile."""
    return num_values * (1 - q) >= 10 - 1e-9

"""Figures of engines side by side: of each arm the median over rounds, and the ratio to the first.

Pure: records in, figures out. The unit is the round: a figure is computed in each round and its
median taken; a ratio is that of the same round, so that drift of the machine cancels.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from penstock.measure.environment import busy_note
from penstock.measure.load.notes import MAX_LAG_S
from penstock.measure.meters.energy import energy_of, per
from penstock.measure.meters.figures import memory_figures
from penstock.measure.meters.series import phases
from penstock.measure.metrics import NS, e2e_s, quantile, tpot_s, ttft_s
from penstock.measure.records import Header, Mark, Record, Request, Sample


class Formula(NamedTuple):
    """A figure of a stage: its unit (see `report.units`), which way is better, how it is made."""

    unit: str
    better: str
    text: str


FORMULAS = {
    "port_s": Formula("s", "lower", "process made until its port is open"),
    "ready_s": Formula("s", "lower", "port open until it says that it is ready"),
    "load_s": Formula("s", "lower", "engine made until it is loaded, in process"),
    "first_token_s": Formula("s", "lower", "ready until the first token of the first answer"),
    "total_s": Formula("s", "lower", "process made until the first token of the first answer"),
    "ttft_s": Formula("s", "lower", "median over requests of t_first - t_sent"),
    "prefill_tokens_per_s": Formula(
        "tokens/s", "higher", "median over requests of (n_in - n_cached) / ttft_s"
    ),
    "tpot_s": Formula("s", "lower", "median over requests of tpot_s"),
    "decode_tokens_per_s": Formula("tokens/s", "higher", "1 / tpot_s"),
    "e2e_s": Formula("s", "lower", "median over requests of t_done - t_sent"),
    "output_tokens_per_s": Formula(
        "tokens/s", "higher", "sum of n_out / (last t_done - first t_sent)"
    ),
    "total_tokens_per_s": Formula(
        "tokens/s", "higher", "sum of (n_in + n_out) / (last t_done - first t_sent)"
    ),
    "requests_per_s": Formula("1/s", "higher", "answers / (last t_done - first t_sent)"),
    "ttft_p95_s": Formula("s", "lower", "95th percentile of t_first - t_sent"),
    "output_tokens": Formula("tokens", "", "sum of n_out: what the answers came to"),
    "num_failed": Formula("", "lower", "requests without a whole answer"),
    "started_rss_bytes": Formula(
        "bytes", "lower", "resident memory of the process tree after the first answer"
    ),
    "peak_rss_bytes": Formula(
        "bytes", "lower", "highest reading of the process tree's resident memory since then"
    ),
    "hwm_bytes": Formula(
        "bytes", "lower", "sum of the most that each process ever had, loading included"
    ),
    "peak_gpu_bytes": Formula("bytes", "lower", "highest reading of GPU memory"),
    "joules_per_output_token": Formula(
        "J", "lower", "gross energy of the stage / sum of n_out; label in `energy`"
    ),
}
MEMORY = ("started_rss_bytes", "peak_rss_bytes", "hwm_bytes", "peak_gpu_bytes")
Rounds = dict[int, float]  # a figure in each round


def figures(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """Figures of a run of the kind `engines`, and why they are not valid."""
    names = [arm.name for arm in header.arms]
    arms = {name: _Arm(name, header, records) for name in names}
    order: dict[tuple[str, str], None] = {}
    for arm in arms.values():
        order |= dict.fromkeys(arm.values)
    stages = ["startup", *(work["stage"] for work in header.settings["works"]), "memory"]
    rows = [
        _row(stage, figure, arms, names[0])
        for stage, figure in sorted(
            order, key=lambda key: (stages.index(key[0]), list(FORMULAS).index(key[1]))
        )
    ]
    problems = [problem for arm in arms.values() for problem in arm.problems()]
    about = {name: arm.about() for name, arm in arms.items()}
    made: dict[str, Any] = {"first": names[0], "arms": about, "rows": rows, "problems": problems}
    busy = busy_note(header.environment)
    made["notes"] = [] if busy is None else [busy]
    return made, problems


def _row(stage: str, figure: str, arms: Mapping[str, _Arm], first: str) -> dict[str, Any]:
    """A figure of all arms."""
    formula = FORMULAS[figure]
    base = arms[first].values.get((stage, figure), {})
    cells = {
        name: _cell(values, base) if (values := arm.values.get((stage, figure))) else None
        for name, arm in arms.items()
    }
    return {
        "stage": stage,
        "figure": figure,
        "unit": formula.unit,
        "better": formula.better,
        "formula": formula.text,
        "arms": cells,
    }


def _cell(values: Rounds, base: Rounds) -> dict[str, Any]:
    """Median and extremes over rounds; the ratio is the median of the rounds' ratios."""
    ratios = [value / base[round_] for round_, value in values.items() if base.get(round_)]
    return {
        "median": statistics.median(values.values()),
        "min": min(values.values()),
        "max": max(values.values()),
        "num_rounds": len(values),
        "rounds": {str(round_): value for round_, value in values.items()},
        "ratio": statistics.median(ratios) if ratios else None,
    }


class _Arm:
    """What the records say of one arm."""

    def __init__(self, name: str, header: Header, records: Sequence[Record]) -> None:
        self.name, self._header, self._records = name, header, records
        marks = [one for one in records if isinstance(one, Mark) and one.arm == name]
        self.started = [mark for mark in marks if mark.name == "started"]
        self.failed = [mark for mark in marks if mark.name == "failed"]
        self._num_ended = sum(mark.name == "ended" for mark in marks)
        stages = {work["stage"] for work in header.settings["works"]}
        self._rows = [
            one
            for one in records
            if isinstance(one, Request)
            and (one.arm, one.phase) == (name, "steady")
            and one.stage in stages  # not the first answer of all
        ]
        self.energy: dict[str, Any] = {}
        self.values: dict[tuple[str, str], Rounds] = {}
        self._startup()
        for work in header.settings["works"]:
            self._stage(work["stage"], work["kind"])
        self._memory()

    def _put(self, stage: str, figure: str, round_: int, value: float | None) -> None:
        if value is not None:
            self.values.setdefault((stage, figure), {})[round_] = value

    def _startup(self) -> None:
        for mark in self.started:
            for phase, seconds in mark.facts["startup"].items():
                self._put("startup", phase, mark.facts["round"], seconds)

    def _stage(self, stage: str, kind: str) -> None:
        rows = [row for row in self._rows if row.stage == stage]
        for round_ in sorted({row.block for row in rows}):
            block = [row for row in rows if row.block == round_]
            good = [row for row in block if row.ok]
            made = _latency(good) if kind == "latency" else _throughput(good)
            for figure, value in made.items():
                self._put(stage, figure, round_, value)
            self._put(stage, "num_failed", round_, len(block) - len(good))
        self._energy(stage, kind, rows)

    def _energy(self, stage: str, kind: str, rows: Sequence[Request]) -> None:
        """Of the stage's windows in all rounds together; each round's, per output token."""
        windows = [
            (one.begin_ns, one.end_ns)
            for one in phases(self._records)
            if (one.arm, one.stage, one.name) == (self.name, stage, kind)
        ]
        if not windows:
            return
        settings = self._header.settings
        spent = energy_of(self._records, self.name, windows, settings)
        self.energy[stage] = {
            "joules_gross": spent.joules_gross,
            "joules_net": spent.joules_net,
            "label": spent.label,
            "source": spent.source,
            "explanation": spent.explanation,
        }
        for begin_ns, end_ns in windows:
            inside = [row for row in rows if begin_ns <= (row.t_done_ns or -1) <= end_ns]
            num_tokens = sum(row.n_out or 0 for row in inside if row.ok)
            one = energy_of(self._records, self.name, [(begin_ns, end_ns)], settings)
            if inside:
                value = per(one.joules_gross, num_tokens)
                self._put(stage, "joules_per_output_token", inside[0].block, value)

    def _memory(self) -> None:
        """In each round: from its start to the start of the arm's next one."""
        samples = [
            one
            for one in self._records
            if isinstance(one, Sample) and one.arm == self.name and one.source == "proc"
        ]
        begins = [mark.t_ns for mark in self.started]
        for mark, end_ns in zip(self.started, (*begins[1:], None), strict=False):
            told = memory_figures(self._records, self.name, mark.t_ns, end_ns)
            first = next((one for one in samples if one.t_ns >= mark.t_ns), None)
            values = dict(told)
            values["started_rss_bytes"] = None if first is None else first.values["rss_bytes"]
            if mark.facts.get("is_in_process"):
                values["hwm_bytes"] = None  # of this process: of all arms before it too
            for figure in MEMORY:
                value = values[figure]
                if isinstance(value, int | float):
                    self._put("memory", figure, mark.facts["round"], value)

    def about(self) -> dict[str, Any]:
        """Who answered, and what could not be measured."""
        told = self.started[-1].facts if self.started else {}
        return {
            "about": told.get("about", {}),
            "limits": told.get("limits", []),
            "page_cache_shares": [mark.facts.get("page_cache_share") for mark in self.started],
            "energy": self.energy,
            "failed": [
                {"stage": mark.stage, "round": mark.facts["round"], "reason": mark.facts["reason"]}
                for mark in self.failed
            ],
            "num_requests": len(self._rows),
            "num_errors": _counts(row.error_class for row in self._rows if not row.ok),
            "num_short": len(self._short()),
            "count_sources": _counts(row.count_source for row in self._rows if row.ok),
            "num_cached_tokens": sum(row.n_cached or 0 for row in self._rows),
            "client_loop_lag_s": self._loop_lag_s(),
        }

    def problems(self) -> list[str]:
        """Why the arm cannot be compared with the others."""
        found = [
            f"{self.name} failed in round {mark.facts['round'] + 1} ({mark.stage}): "
            + mark.facts["reason"].partition("\n")[0]
            for mark in self.failed
        ]
        num_rounds = self._header.settings["num_rounds"]
        if not self.failed and self._num_ended < num_rounds:
            found.append(
                f"{self.name}: the run was interrupted, with {self._num_ended} of {num_rounds} "
                "rounds ended."
            )
        if bad := [row for row in self._rows if not row.ok]:
            found.append(
                f"{self.name}: {len(bad)} of {len(self._rows)} requests have no whole answer; the "
                f"first ({bad[0].error_class}): {bad[0].error}"
            )
        if short := self._short():
            found.append(
                f"{self.name}: {len(short)} of {len(self._rows)} answers are not as long as asked: "
                "the work was not the same; figures per token stand."
            )
        if any(row.n_cached for row in self._rows):
            found.append(f"{self.name}: tokens of prompts came from a prefix cache.")
        if (lag_s := self._loop_lag_s()) is not None and lag_s > MAX_LAG_S:
            found.append(
                f"{self.name}: the client stood still for {lag_s:.2g} s (allowed: {MAX_LAG_S:g} "
                "s): its times are late by as much."
            )
        if uncounted := sum(row.ok and row.n_out is None for row in self._rows):
            found.append(f"{self.name}: {uncounted} answers have no count of tokens.")
        return found

    def _loop_lag_s(self) -> float | None:
        """How long the client's event loop stood still at worst, while this arm was asked."""
        lags = [
            one.values["loop_lag_s"]
            for one in self._records
            if isinstance(one, Sample) and (one.source, one.arm) == ("client", self.name)
        ]
        return max(lags, default=None)

    def _short(self) -> list[Request]:
        """Answers of another length than asked."""
        return [
            row
            for row in self._rows
            if row.ok
            and row.n_out is not None
            and row.details.get("asked_out", row.n_out) != row.n_out
        ]


def _latency(rows: Sequence[Request]) -> dict[str, float | None]:
    """Of the answers of one round, asked one at a time."""
    tpot = _median(map(tpot_s, rows))
    return {
        "ttft_s": _median(map(ttft_s, rows)),
        "prefill_tokens_per_s": _median(map(_prefill_tokens_per_s, rows)),
        "tpot_s": tpot,
        "decode_tokens_per_s": 1 / tpot if tpot else None,
        "e2e_s": _median(map(e2e_s, rows)),
    }


def _prefill_tokens_per_s(row: Request) -> float | None:
    seconds = ttft_s(row)
    return None if row.n_in is None or not seconds else (row.n_in - (row.n_cached or 0)) / seconds


def _throughput(rows: Sequence[Request]) -> dict[str, float | None]:
    """Of the answers of one round, many at a time."""
    begins = [row.t_sent_ns for row in rows if row.t_sent_ns is not None]
    ends = [row.t_done_ns for row in rows if row.t_done_ns is not None]
    seconds = (max(ends) - min(begins)) * NS if begins and ends else 0.0
    if not seconds:
        return {}
    num_out = [row.n_out for row in rows]
    num_all = [_sum_of(row.n_in, row.n_out) for row in rows]
    first = [value for value in map(ttft_s, rows) if value is not None]
    return {
        "output_tokens_per_s": _rate(num_out, seconds),
        "total_tokens_per_s": _rate(num_all, seconds),
        "requests_per_s": len(rows) / seconds,
        "ttft_s": _median(first),
        "ttft_p95_s": quantile(first, 0.95) if first else None,
        "tpot_s": _median(map(tpot_s, rows)),
        "e2e_s": _median(map(e2e_s, rows)),
        "output_tokens": _rate(num_out, 1.0),
    }


def _sum_of(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left + right


def _rate(counts: Sequence[int | None], seconds: float) -> float | None:
    """None if one of them is not known: a sum of some would be too low."""
    known = [count for count in counts if count is not None]
    return sum(known) / seconds if len(known) == len(counts) else None


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name or "" for name in names))

"""The figures of an evaluation, computed from the header's facts of the tasks and the raw rows.

The unit is the item: repeats of one are averaged first. An item that failed counts as 0, and how
many did stands beside; what the run's end cut off does not count at all. Knows no page; two arms
are compared in `penstock.measure.verdict`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.measure.quality.tasks import JUDGE, ScoreFacts, TaskFacts
from penstock.measure.records import Header, Mark, Record, Request

CONFIDENCE = 0.95


@dataclass
class Unit:
    """One item with its rows; every repeat of it."""

    name: str
    group: str
    category: str
    rows: list[Request] = field(default_factory=list)

    def score(self, name: str) -> float:
        """Mean over the repeats; a repeat without the score is 0."""
        return math.fsum(row.scores.get(name, 0.0) for row in self.rows) / len(self.rows)

    def weight(self, name: str | None) -> float:
        if name is None:
            return 1.0
        return float(next((row.details[name] for row in self.rows if name in row.details), 0.0))


def figures(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """Figures by arm and task, and why they are not valid."""
    facts = {
        name: msgspec.convert(told, TaskFacts)
        for name, told in header.settings.get("tasks", {}).items()
    }
    repeats = header.settings.get("repeats", {})
    rows = [record for record in records if isinstance(record, Request)]
    problems = [
        str(record.facts.get("message", record.name))
        for record in records
        if isinstance(record, Mark) and record.name == "problem"
    ]
    made: dict[str, Any] = {}
    for arm in header.arms:
        tasks: dict[str, Any] = {}
        for name, told in facts.items():
            mine = [row for row in rows if row.arm == arm.name and row.task == name]
            tasks[name] = task_figures(told, mine)
            problems += _problems(told, mine, repeats.get(name, 1))
        made[arm.name] = {"tasks": tasks} | _boards(header, rows, arm.name)
    result: dict[str, Any] = {"arms": made}
    if judged := _judged(header, rows):
        result["judge"] = judged
        problems += _judge_problems(judged, records)
    return result, problems


def task_figures(facts: TaskFacts, rows: Sequence[Request]) -> dict[str, Any]:
    """Figures of one task for one arm."""
    whole = [row for row in rows if row.error_class != "cut"]
    units = units_of(whole)
    answered = [row for row in whole if row.error_class is None]
    main = facts.main_score
    out: dict[str, Any] = {
        "num_items": len(units),
        "num_rows": len(whole),
        "num_answered": len(answered),
        "num_cut": len(rows) - len(whole),
        "errors": dict(Counter(row.error_class for row in whole if row.error_class)),
        "num_empty": sum(_is_empty(row) for row in answered),
        "num_truncated": sum(row.finish_reason == "length" for row in answered),
        "main_score": main,
        "scores": {
            name: score_figure(name, told, units, whole) for name, told in facts.scores.items()
        },
        "of_answered": _mean_of(main, facts.scores.get(main), units_of(answered)),
        "categories": _categories(main, facts, units),
        "random_baseline": facts.random_baseline,
        "published": facts.published,
        "output_tokens": _sum(row.n_out for row in whole),
        "input_tokens": _sum(row.n_in for row in whole),
        "usd": _sum(row.usd for row in whole),
    }
    out["above_chance"] = _above(out["scores"].get(main), facts.random_baseline)
    return out


def _is_empty(row: Request) -> bool:
    """Whether nothing was written; scored continuations have no output at all."""
    return row.output is not None and not row.output.strip()


def units_of(rows: Iterable[Request]) -> list[Unit]:
    """Rows by item."""
    units: dict[str, Unit] = {}
    for row in rows:
        unit = units.get(row.prompt_id)
        if unit is None:
            group = str(row.details.get("group") or row.prompt_id)
            category = str(row.details.get("category") or "")
            unit = units[row.prompt_id] = Unit(row.prompt_id, group, category)
        unit.rows.append(row)
    return list(units.values())


def score_figure(
    name: str, facts: ScoreFacts, units: Sequence[Unit], rows: Sequence[Request]
) -> dict[str, Any]:
    """One figure with its interval, or why it has none."""
    if not units:
        return {"value": None, "why": "no item was asked"}
    if facts.how == "corpus":
        return _corpus(facts, rows)
    if not any(name in row.scores or row.error_class for row in rows):
        return {"value": None, "why": "no answer has this score"}
    return mean_figure(name, facts, units)


def mean_figure(name: str, facts: ScoreFacts, units: Sequence[Unit]) -> dict[str, Any]:
    """The weighted mean over items with a two-sided 95 % interval, and how it was made.

    Shares of right answers, or of parts of them, have Wilson's interval, with as many items as
    independent ones would need to be for the same clustered error; where that is estimated, times
    (z / t(groups - 1))² (Korn and Graubard 1998). If none or all are right, the other end is that
    of the rule of three, 1 - 0.05^(1/n), n: groups. Otherwise it is mean ± t·SE, within [0, 1] for
    scores that are. Errors are clustered by group (Miller 2024, arXiv 2411.00640).
    """
    values = [unit.score(name) for unit in units]
    weights = [unit.weight(facts.weight) for unit in units]
    total = math.fsum(weights)
    if total == 0:
        return {"value": None, "why": f"no item has `{facts.weight}`"}
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    groups: dict[str, float] = {}
    for unit, value, weight in zip(units, values, weights, strict=True):
        groups[unit.group] = groups.get(unit.group, 0.0) + weight * (value - mean) / total
    error = _error(list(groups.values()))
    in_unit = min(values) >= 0 and max(values) <= 1
    if in_unit and (facts.weight is not None or all(_is_binary(name, unit) for unit in units)):
        estimated = len(groups) < len(values) or not set(values) <= {0.0, 1.0}
        low, high, method = _share_interval(mean, error, len(values), len(groups), estimated)
    else:
        low, high, method = _mean_interval(mean, error, len(values), len(groups))
    if low is not None and high is not None and in_unit:
        low, high = max(low, 0.0), min(high, 1.0)
    return {
        "value": mean,
        "low": low,
        "high": high,
        "method": method,
        "standard_error": error,
        "num_items": len(values),
        "num_groups": len(groups),
        "num_failed": sum(all(name not in row.scores for row in unit.rows) for unit in units),
        "higher_is_better": facts.higher_is_better,
    }


def _error(sums: Sequence[float]) -> float | None:
    """Clustered standard error from the sums of the groups' weighted residuals."""
    if len(sums) < 2:
        return None
    return math.sqrt(math.fsum(one * one for one in sums) * len(sums) / (len(sums) - 1))


def _is_binary(name: str, unit: Unit) -> bool:
    """Whether each answer is right or wrong; the mean of its repeats may be between."""
    return all(row.scores.get(name, 0.0) in (0.0, 1.0) for row in unit.rows)


def _share_interval(
    mean: float, error: float | None, num_items: int, num_groups: int, estimated: bool
) -> tuple[float | None, float | None, str]:
    from penstock.measure.verdict.statistics import (
        bound_of_none,
        normal_quantile,
        t_quantile,
        wilson,
    )

    if math.isclose(mean, 0, abs_tol=1e-12):
        return 0.0, bound_of_none(num_groups, CONFIDENCE), "rule of three"
    if math.isclose(mean, 1):
        return 1 - bound_of_none(num_groups, CONFIDENCE), 1.0, "rule of three"
    if error is None:
        return None, None, "one group has no interval"
    # As many independent items as have this error; n / (n - 1): the error's own.
    effective = float(num_items)
    if error > 0:
        effective = mean * (1 - mean) / error**2 * num_items / (num_items - 1)
    if num_groups < num_items:
        effective = min(effective, num_items)
    if estimated:
        quantile = (1 + CONFIDENCE) / 2
        ratio = float(normal_quantile(quantile) / t_quantile(quantile, num_groups - 1))
        effective *= ratio**2
    trials = max(round(effective), 1)
    made = wilson(mean * trials, trials, CONFIDENCE)
    return made.low, made.high, "Wilson" + _clustered(num_items, num_groups)


def _mean_interval(
    mean: float, error: float | None, num_items: int, num_groups: int
) -> tuple[float | None, float | None, str]:
    from penstock.measure.verdict.statistics import t_quantile

    if error is None:
        return None, None, "one group has no interval"
    half = error * float(t_quantile((1 + CONFIDENCE) / 2, num_groups - 1))
    return mean - half, mean + half, "mean ± t·SE" + _clustered(num_items, num_groups)


def _clustered(num_items: int, num_groups: int) -> str:
    return ", clustered" if num_groups < num_items else ""


def _mean_of(name: str, facts: ScoreFacts | None, units: Sequence[Unit]) -> float | None:
    """The main score among whole answers only: what errors hide."""
    if facts is None or facts.how == "corpus" or not units:
        return None
    value = mean_figure(name, facts, units)["value"]
    return None if value is None else float(value)


def _categories(main: str, facts: TaskFacts, units: Sequence[Unit]) -> dict[str, Any]:
    """The main score by category, where there are any."""
    told = facts.scores.get(main)
    names = dict.fromkeys(unit.category for unit in units)
    if told is None or told.how == "corpus" or set(names) <= {""}:
        return {}
    return {
        name: mean_figure(main, told, [unit for unit in units if unit.category == name])
        for name in names
    }


def _corpus(facts: ScoreFacts, rows: Sequence[Request]) -> dict[str, Any]:
    from penstock.measure.quality.text_metrics import corpus

    outputs = [row.output or "" for row in rows]
    references = [[str(one) for one in row.details["references"]] for row in rows]
    score, signature = corpus(outputs=outputs, references=references, **facts.metric)
    return {
        "value": score,
        "low": None,
        "high": None,
        "method": "of all answers together; `penstock compare` has its interval",
        "signature": signature,
        "num_items": len(rows),
        "num_failed": sum(row.error_class is not None for row in rows),
        "higher_is_better": True,
    }


def _above(figure: Mapping[str, Any] | None, baseline: float | None) -> bool | None:
    """Whether the whole interval lies above chance; None where chance means nothing."""
    if figure is None or baseline is None or figure.get("low") is None:
        return None
    return bool(figure["low"] > baseline)


def _problems(facts: TaskFacts, rows: Sequence[Request], repeats: int) -> list[str]:
    problems = []
    missing = facts.num_items * repeats - len(rows)
    cut = sum(row.error_class == "cut" for row in rows)
    if missing > 0 or cut:
        problems.append(
            f"`{facts.name}`: {max(missing, 0) + cut} of {facts.num_items * repeats} answers are "
            "missing, because the run ended early."
        )
    failed = [row for row in rows if row.error_class not in (None, "cut")]
    if len(failed) > 0.05 * len(rows):
        problems.append(
            f"`{facts.name}`: {len(failed)} of {len(rows)} requests failed, and the score counts "
            f"them as wrong. The first: {_first_failure(failed)}."
        )
    return problems


def _boards(header: Header, rows: Sequence[Request], arm: str) -> dict[str, Any]:
    """lm-eval's own figures, and the columns of the Open LLM Leaderboards that they fill."""
    plan = header.settings.get("harness")
    if not plan:
        return {}
    from penstock.measure.quality.harness import leaderboard
    from penstock.measure.quality.harness.rows import Metric, results_of

    mine = [row for row in rows if row.arm == arm and row.task in plan["tasks"]]
    metrics = {
        name: msgspec.convert(told["metrics"], dict[str, Metric])
        for name, told in plan["tasks"].items()
    }
    results = results_of(mine, metrics)
    num_items = Counter(row.task for row in mine)
    boards = {
        "version 1": leaderboard.board_v1(results)._asdict(),
        "version 2": leaderboard.board_v2(results, num_items, mine)._asdict(),
    }
    return {"harness": results, "boards": boards}


def _judged(header: Header, rows: Sequence[Request]) -> dict[str, Any] | None:
    settings = header.settings.get("judge")
    if not settings:
        return None
    from penstock.measure.quality.judge_figures import judge_figures

    return judge_figures(settings, [row for row in rows if row.task == JUDGE])


def _judge_problems(judged: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """A judge that was not asked everything, or did not answer."""
    told = judged["conduct"]
    marks = [record for record in records if isinstance(record, Mark) and record.name == "judging"]
    wanted = max((mark.facts["num_requests"] for mark in marks), default=0)
    problems = []
    if not marks:
        problems.append("judge: all verdicts are missing, because the run ended before it judged.")
    if told["num_asked"] - told["num_cut"] < wanted:
        missing = wanted - told["num_asked"] + told["num_cut"]
        problems.append(
            f"judge: {missing} of {wanted} verdicts are missing, because the run ended early."
        )
    if told["num_failed"] > 0.05 * told["num_asked"]:
        asked = (row for row in records if isinstance(row, Request) and row.task == JUDGE)
        first = _first_failure([row for row in asked if row.error_class not in (None, "cut")])
        problems.append(
            f"judge: {told['num_failed']} of {told['num_asked']} requests failed, and what they "
            f"were about does not count. The first: {first}."
        )
    return problems


def _first_failure(failed: Sequence[Request]) -> str:
    why = " ".join((failed[0].error or "").split())[:200]
    return f"{failed[0].error_class}: {why}".rstrip(": .")


def _sum(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None

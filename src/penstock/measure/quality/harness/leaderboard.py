"""The columns of the Open LLM Leaderboards, from lm-eval's results: pure functions.

lm-eval has the tasks of both boards (groups `openllm` and `leaderboard`) but neither their averages
nor the normalisation of the second. Formulas: the boards' documentation; which raw columns are
weighted by size is seen in the published tables (tests/measure/test_harness_leaderboard.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from penstock.measure.records import Request

Results = Mapping[str, Mapping[str, float]]  # by task and `metric,filter`, as of `rows.results_of`

# Version 1: column, task, metric. MMLU is the plain mean of its subjects, not lm-eval's group.
V1 = {
    "ARC": ("arc_challenge", "acc_norm,none"),
    "HellaSwag": ("hellaswag", "acc_norm,none"),
    "MMLU": ("mmlu_*", "acc,none"),
    "TruthfulQA": ("truthfulqa_mc2", "acc,none"),
    "Winogrande": ("winogrande", "acc,none"),
    "GSM8K": ("gsm8k", "exact_match,strict-match"),
}
NUM_MMLU = 57
# Version 2: choices of each subtask; chance gets one of them right.
BBH = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
MUSR = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
GPQA = ("diamond", "extended", "main")
MATH = (
    *("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory"),
    *("prealgebra", "precalculus"),
)
MMLU_PRO = "leaderboard_mmlu_pro"
GPQA_CHANCE, MMLU_PRO_CHANCE = 1 / 4, 1 / 10


class Board(NamedTuple):
    """A model's row.

    Attributes:
        columns: in percent, by the board's names; None where a task of it is missing.
        missing: tasks without results.
    """

    columns: dict[str, float | None]
    missing: list[str]


def normalized(raw: float, chance: float) -> float:
    """0 at what chance gets and below, 100 for all right (leaderboard v2's documentation)."""
    return max(0.0, (raw - chance) / (1 - chance) * 100)


def board_v1(results: Results) -> Board:
    """Version 1: six raw scores and their plain mean."""
    missing: list[str] = []
    columns: dict[str, float | None] = {}
    for column, (task, metric) in V1.items():
        if task.endswith("*"):
            subjects = [name for name in results if name.startswith(task[:-1])]
            values = [results[name].get(metric) for name in subjects]
            values += [None] * (NUM_MMLU - len(subjects))
        else:
            values = [results.get(task, {}).get(metric)]
        mean = _mean(values)
        missing += [task] if mean is None else []
        columns[column] = None if mean is None else 100 * mean
    columns["Average"] = _mean(columns.values())
    return Board(columns, missing)


def board_v2(results: Results, num_items: Mapping[str, int], rows: Iterable[Request] = ()) -> Board:
    """Version 2: raw and normalised scores and the mean of the six normalised ones.

    BBH and MuSR are normalised by subtask and then averaged; of the others the aggregate is
    normalised. With `rows` of MMLU-Pro there is a column more: normalised item by item, as 17 % of
    its items have fewer than the 10 choices that the board counts with.

    Args:
        num_items: documents of each task, which GPQA and MATH weight by.
    """
    source = _Source(results, num_items)
    ifeval = _mean(
        source.get("leaderboard_ifeval", f"{level}_level_strict_acc,none")
        for level in ("prompt", "inst")
    )
    gpqa = source.weighted([f"leaderboard_gpqa_{name}" for name in GPQA], "acc_norm,none")
    math = source.weighted([f"leaderboard_math_{name}_hard" for name in MATH], "exact_match,none")
    mmlu_pro = source.get(MMLU_PRO, "acc,none")
    bbh, bbh_normalized = source.by_subtask("leaderboard_bbh_", BBH)
    musr, musr_normalized = source.by_subtask("leaderboard_musr_", MUSR)
    pairs = {
        "IFEval": (ifeval, _normalized(ifeval, 0.0)),
        "BBH": (bbh, bbh_normalized),
        "MATH Lvl 5": (math, _normalized(math, 0.0)),
        "GPQA": (gpqa, _normalized(gpqa, GPQA_CHANCE)),
        "MUSR": (musr, musr_normalized),
        "MMLU-PRO": (mmlu_pro, _normalized(mmlu_pro, MMLU_PRO_CHANCE)),
    }
    columns: dict[str, float | None] = {"Average": _mean(value for _, value in pairs.values())}
    for name, (raw, value) in pairs.items():
        columns[f"{name} Raw"] = None if raw is None else 100 * raw
        columns[name] = value
    columns["MMLU-PRO by item"] = by_item(row for row in rows if row.task == MMLU_PRO)
    return Board(columns, sorted(source.missing))


def by_item(rows: Iterable[Request], score: str = "acc,none") -> float | None:
    """Scores normalised by each item's own chance of 1 / choices, averaged; in percent."""
    values = [
        (row.scores[score] - 1 / n) / (1 - 1 / n)
        for row in rows
        if score in row.scores and (n := row.details.get("num_choices", 0)) > 1
    ]
    mean = _mean(values)
    return None if mean is None else max(0.0, 100 * mean)


class _Source:
    """Results by task, which notes what is missing."""

    def __init__(self, results: Results, num_items: Mapping[str, int]) -> None:
        self._results = results
        self._num_items = num_items
        self.missing: set[str] = set()

    def get(self, task: str, metric: str) -> float | None:
        found = self._results.get(task, {}).get(metric)
        if found is None:
            self.missing.add(task)
        return found

    def weighted(self, tasks: list[str], metric: str) -> float | None:
        values = {task: self.get(task, metric) for task in tasks}
        if None in values.values():
            return None
        total = sum(self._num_items[task] for task in tasks)
        return sum((values[task] or 0.0) * self._num_items[task] for task in tasks) / total

    def by_subtask(
        self, prefix: str, choices: Mapping[str, int]
    ) -> tuple[float | None, float | None]:
        """Plain means of raw and of normalised `acc_norm`."""
        values = [(self.get(prefix + name, "acc_norm,none"), 1 / n) for name, n in choices.items()]
        raw = _mean(value for value, _ in values)
        return raw, _mean(_normalized(value, chance) for value, chance in values)


def _normalized(raw: float | None, chance: float) -> float | None:
    return None if raw is None else normalized(raw, chance)


def _mean(values: Iterable[float | None]) -> float | None:
    """None if one is missing, or there is none."""
    listed = list(values)
    there = [value for value in listed if value is not None]
    return sum(there) / len(there) if there and len(there) == len(listed) else None

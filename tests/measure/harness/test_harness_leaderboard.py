"""The boards' formulas against the boards' published tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from penstock.measure.quality.harness.leaderboard import (
    BBH,
    GPQA,
    GPQA_CHANCE,
    MATH,
    MMLU_PRO_CHANCE,
    MUSR,
    board_v1,
    board_v2,
    normalized,
)
from penstock.measure.records import Request

NUM_MUSR = {"murder_mysteries": 250, "object_placements": 256, "team_allocation": 250}
NUM_IFEVAL_PROMPTS, NUM_IFEVAL_INSTRUCTIONS = 541, 834
NUM_GPQA, NUM_MATH, NUM_MMLU_PRO = 1192, 1324, 12032


def table(data_dir: Path, name: str) -> list[dict[str, str]]:
    path = data_dir / "table-open-llm-leaderboard" / f"open_llm_leaderboard_{name}.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def v1_results(row: dict[str, float]) -> dict[str, dict[str, float]]:
    """Six scores in percent as lm-eval's results."""
    results = {
        "arc_challenge": {"acc_norm,none": row["arc"] / 100},
        "hellaswag": {"acc_norm,none": row["hellaswag"] / 100},
        "truthfulqa_mc2": {"acc,none": row["truthfulqa"] / 100},
        "winogrande": {"acc,none": row["winogrande"] / 100},
        "gsm8k": {"exact_match,strict-match": row["gsm8k"] / 100},
    }
    for subject in range(57):
        results[f"mmlu_{subject}"] = {"acc,none": row["mmlu"] / 100}
    return results


def test_version_1_equals_its_table(data_dir: Path) -> None:
    rows = table(data_dir, "v1")
    assert len(rows) == 7169
    names = ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande", "gsm8k")
    for row in rows:
        board = board_v1(v1_results({name: float(row[name]) for name in names}))
        # The table rounds to two places, what it averaged as well as the average.
        assert board.columns["Average"] == pytest.approx(float(row["average"]), abs=0.0101)
        assert not board.missing


def v2_results(row: dict[str, str]) -> dict[str, dict[str, float]]:
    """Raw scores as results in which all subtasks are as good as one another."""

    def raw(name: str) -> float:
        return float(row[f"evaluations_{name}_value"])

    results = {
        "leaderboard_ifeval": {
            f"{level}_level_strict_acc,none": raw("ifeval") for level in ("prompt", "inst")
        },
        "leaderboard_mmlu_pro": {"acc,none": raw("mmlu_pro")},
    }
    results |= {f"leaderboard_bbh_{name}": {"acc_norm,none": raw("bbh")} for name in BBH}
    results |= {f"leaderboard_musr_{name}": {"acc_norm,none": raw("musr")} for name in MUSR}
    results |= {f"leaderboard_gpqa_{name}": {"acc_norm,none": raw("gpqa")} for name in GPQA}
    for name in MATH:
        results[f"leaderboard_math_{name}_hard"] = {"exact_match,none": raw("math")}
    return results


def test_version_2_equals_its_table(data_dir: Path) -> None:
    """Of BBH and MuSR the table does not say the subtasks: their columns are tested apart."""
    rows = table(data_dir, "v2")
    assert len(rows) == 4576
    whole = {"IFEval": "ifeval", "MATH Lvl 5": "math", "GPQA": "gpqa", "MMLU-PRO": "mmlu_pro"}
    for row in rows:
        results = v2_results(row)
        board = board_v2(results, dict.fromkeys(results, 1))
        for column, name in whole.items():
            published = float(row[f"evaluations_{name}_normalized_score"])
            assert board.columns[column] == pytest.approx(published, abs=1e-6)
        assert board.columns["MMLU-PRO by item"] is None
        names = (*whole.values(), "bbh", "musr")
        mean = sum(float(row[f"evaluations_{name}_normalized_score"]) for name in names) / 6
        assert mean == pytest.approx(float(row["model_average_score"]), abs=1e-6)


def is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6


def test_how_raw_columns_are_aggregated(data_dir: Path) -> None:
    """Weighted columns are whole numbers of right answers; MuSR and IFEval are plain means."""
    for row in table(data_dir, "v2")[::40]:
        raw = {
            name: float(row[f"evaluations_{name}_value"]) for name in ("gpqa", "math", "mmlu_pro")
        }
        assert is_whole(raw["gpqa"] * NUM_GPQA)
        assert is_whole(raw["math"] * NUM_MATH)
        assert is_whole(raw["mmlu_pro"] * NUM_MMLU_PRO)
        twice = 2 * float(row["evaluations_ifeval_value"])
        prompts = (right / NUM_IFEVAL_PROMPTS for right in range(NUM_IFEVAL_PROMPTS + 1))
        assert any(is_whole((twice - share) * NUM_IFEVAL_INSTRUCTIONS) for share in prompts)


def test_musr_is_normalized_by_subtask(data_dir: Path) -> None:
    """Whole numbers of right answers are found that give both published numbers of each row."""
    rows = [row for row in table(data_dir, "v2")[::400] if row["evaluations_musr_value"]]
    assert len(rows) > 10
    for row in rows:
        raw = float(row["evaluations_musr_value"])
        published = float(row["evaluations_musr_normalized_score"])
        assert any(
            board_musr(first, second, third) == pytest.approx((100 * raw, published), abs=1e-6)
            for first, second, third in solutions(raw, published)
        ), row["model_name"]


def solutions(raw: float, published: float) -> list[tuple[int, int, int]]:
    """Right answers by subtask whose plain mean is `raw`, near the normalised score."""
    found = []
    for second in range(257):
        others = 3 * raw - second / 256
        if not is_whole(others * 250):
            continue
        for first in range(251):
            third = round(others * 250) - first
            shares = (first / 250, second / 256, third / 250)
            near = sum(map(normalized, shares, (1 / 2, 1 / 5, 1 / 3))) / 3
            if 0 <= third <= 250 and abs(near - published) < 1e-6:
                found.append((first, second, third))
    return found


def board_musr(first: int, second: int, third: int) -> tuple[float | None, float | None]:
    shares = dict(zip(NUM_MUSR, (first / 250, second / 256, third / 250), strict=True))
    results = {
        f"leaderboard_musr_{name}": {"acc_norm,none": value} for name, value in shares.items()
    }
    columns = board_v2(results, {}).columns
    return columns["MUSR Raw"], columns["MUSR"]


def test_known_values() -> None:
    assert normalized(0.25, GPQA_CHANCE) == 0
    assert normalized(0.2, GPQA_CHANCE) == 0  # below chance is not below zero
    assert normalized(0.55, MMLU_PRO_CHANCE) == pytest.approx(50)
    half = {f"leaderboard_bbh_{name}": {"acc_norm,none": 0.5} for name in BBH}
    expected = sum(normalized(0.5, 1 / n) for n in BBH.values()) / 24
    assert board_v2(half, {}).columns["BBH"] == pytest.approx(expected)
    assert board_v2(half, {}).columns["BBH Raw"] == 50


def test_weights_of_gpqa() -> None:
    results = {
        f"leaderboard_gpqa_{name}": {"acc_norm,none": value}
        for name, value in zip(GPQA, (1.0, 0.0, 0.0), strict=True)
    }
    sizes = dict(zip(results, (198, 546, 448), strict=True))
    assert board_v2(results, sizes).columns["GPQA Raw"] == pytest.approx(100 * 198 / 1192)


def test_what_is_missing_has_no_average() -> None:
    board = board_v2({"leaderboard_mmlu_pro": {"acc,none": 0.5}}, {})
    assert board.columns["MMLU-PRO"] == pytest.approx(100 * 0.4 / 0.9)
    assert board.columns["Average"] is None
    assert "leaderboard_ifeval" in board.missing
    results = v1_results(
        dict.fromkeys(("arc", "hellaswag", "mmlu", "truthfulqa"), 50.0)
        | {"winogrande": 50.0, "gsm8k": 50.0}
    )
    del results["mmlu_3"]
    assert board_v1(results).columns["MMLU"] is None
    assert board_v1(results).missing == ["mmlu_*"]


def test_mmlu_pro_by_item() -> None:
    """Who guesses gets 0 whatever the numbers of choices are; the board's 1/10 gives more."""
    rows = [
        Request(
            task="leaderboard_mmlu_pro",
            scores={"acc,none": float(item % num_choices == 0)},
            details={"num_choices": num_choices},
        )
        for num_choices in (4, 10)
        for item in range(20)
    ]
    raw = sum(row.scores["acc,none"] for row in rows) / len(rows)
    assert raw == 7 / 40
    board = board_v2({"leaderboard_mmlu_pro": {"acc,none": raw}}, {}, rows)
    assert board.columns["MMLU-PRO by item"] == pytest.approx(0, abs=1e-9)
    assert board.columns["MMLU-PRO"] == pytest.approx(100 * (0.175 - 0.1) / 0.9)


def test_choices_are_those_of_the_tasks() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    from penstock.measure.quality.harness.tasks import _index

    index = _index(("leaderboard",))
    for name, num_choices in BBH.items():
        config = load_yaml(index[f"leaderboard_bbh_{name}"].yaml_path, resolve_func=False)
        assert len(config["doc_to_choice"]) == num_choices, name
    for name in MUSR:
        assert f"leaderboard_musr_{name}" in index
    for name in MATH:
        assert f"leaderboard_math_{name}_hard" in index
    for name in GPQA:
        assert f"leaderboard_gpqa_{name}" in index
